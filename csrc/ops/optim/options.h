// The options of a parameter group, read by the rule's table of fields.
#pragma once
#include <array>
#include <utility>
#include <vector>

#include "python.h"
#include "rule_info.h"

namespace braze {

// What of a group's options decides which state its parameters have, and whether they step here.
struct GroupNeeds {
  uint32_t states = 0;     // bit k: its parameters have state k
  bool on_device = false;  // step counts belong in device memory: capturable or fused
  bool differentiable = false;
  bool operator==(const GroupNeeds&) const = default;
};

struct GroupOptions : GroupNeeds {
  alignas(double) char values[kMaxOptionBytes] = {};  // the rule's Options
  // Tensors in device memory, which only kernels read, in the order of the fields that may be
  // there; borrowed, null where the number is known. In `values` they are NaN.
  std::array<const at::Tensor*, kMaxDeviceFields> tensors = {};
  bool any_tensor = false;
};

// Reads groups[index]; parsed again only if one of its values is another object than last time, or
// mutable.
class GroupReader {
 public:
  void read(PyObject* group, size_t index, const RuleInfo& rule);
  const GroupOptions& options() const { return options_; }
  int traverse(visitproc visit, void* arg) const { return seen_.traverse(visit, arg); }

 private:
  Objects seen_;  // keys and values, in dict order
  bool reusable_ = false;
  GroupOptions options_;
};

// The options with the values of tensors in device memory, which are waited for.
GroupOptions with_values(const GroupOptions& options, const RuleInfo& rule);

}  // namespace braze
