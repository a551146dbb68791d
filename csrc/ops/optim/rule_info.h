// A rule of math/rules.h as the code sees it that is compiled once for all of them.
#pragma once
#include <Python.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../../plan/hyper.h"

namespace braze {

// base^exponent, remembering the last results: groups mostly share their betas and step.
class PowerCache {
 public:
  double operator()(double base, double exponent);

 private:
  struct Entry {
    double base, exponent, result;
  };
  Entry entries_[2] = {{1, 0, 1}, {1, 0, 1}};
  int next_ = 0;
};

// The hyper-parameters of a step on one device; options point to the rule's Options.
class HyperTable {
 public:
  virtual ~HyperTable() = default;
  // on_device: rows hold what the kernels make the arguments of, and add() takes `scalars`.
  virtual void clear(bool on_device) = 0;
  virtual void add(const void* options, const StepInputs& inputs, const DeviceScalar* scalars) = 0;
  virtual Hypers view() const = 0;
};

constexpr size_t kMaxOptionBytes = 128;
constexpr size_t kMaxDeviceFields = 8;

struct RuleInfo {
  const char* name;
  std::span<const Field> fields;
  std::vector<PyObject*> field_keys, state_keys;  // interned
  bool counts_steps, first_overwrites;
  // Of Options: the states that a step with them has, as bits.
  uint32_t (*states)(const void* options);
  // Whether an update with them from zeros is the same as one whose states hold nothing.
  bool (*zeros_serve)(const void* options);
  // How the first gradient of a window joins states[0]; null if the rule does not sum there.
  Fold::Options (*sum_in_state)(const void* options);
  std::unique_ptr<HyperTable> (*make_table)();
};

// Raises ValueError for a name that no optimizer's rule has.
const RuleInfo& rule_named(const std::string& name);

}  // namespace braze
