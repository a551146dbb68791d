// An optimizer's parameters, their state and their groups' options, as C++ sees them: built once
// from Python's objects, and compared with those at every step.
#pragma once
#include <string>
#include <vector>

#include "../../plan/tensor_work.h"
#include "../device_backend.h"
#include "options.h"
#include "seen.h"

namespace braze {

// One parameter. Kept small: every step reads all of them.
struct Slot {
  SeenTensor param;
  SeenTensor state[kMaxStates], step, sum, average;
  PyObject* object = nullptr;      // the parameter itself; owned by Parameters
  PyObject* state_dict = nullptr;  // its inner state dict, or null; owned by Parameters
  int64_t numel = 0;               // real elements
  int32_t group = 0, index = 0;    // param_groups[group]['params'][index]
  int32_t device = 0;              // where it is updated: Parameters::devices[device]
  const char* obstacle = nullptr;  // why no kernel can take this parameter, or null
  DType real = DType::f32;
  bool linear = false;     // dense, and so is all of its state, in the same order
  bool in_window = false;  // states[0] already holds gradients of the open accumulation window

  bool has_sum() const { return sum.tensor != nullptr; }
};

class Parameters {
 public:
  Parameters(const RuleInfo& its_rule, std::string its_owner)
      : rule(its_rule), owner(std::move(its_owner)), devices(1) {}

  // From nothing. An error leaves nothing behind.
  void build(PyObject* groups, PyObject* state);
  // What a slot's state dict holds, where it is another object than before.
  void read_states(Slot& slot);
  void read_options();
  // Python's objects are as they are now on purpose.
  void accept(PyObject* state) { objects_ = objects_of(groups, state); }
  bool same_objects(PyObject* state) const { return braze::same_objects(objects_, groups, state); }
  // Nothing is built, or something stands in a kernel's way, which may have gone since (to_empty(),
  // .to()).
  bool needs_build() const;
  void clear();
  int traverse(visitproc visit, void* arg) const;

  bool unchanged(const Slot& slot) const {
    if (slot.obstacle != nullptr) return false;
    for (const SeenTensor* entry : {&slot.param, &slot.step, &slot.sum, &slot.average}) {
      if (!seen_.unchanged(*entry)) return false;
    }
    for (size_t k = 0; k < rule.state_keys.size(); ++k) {
      if (!seen_.unchanged(slot.state[k])) return false;
    }
    return true;
  }
  const GroupOptions& options(const Slot& slot) const {
    return readers_[static_cast<size_t>(slot.group)].options();
  }
  const std::vector<GroupReader>& readers() const { return readers_; }
  size_t index_of(const Slot& slot) const { return static_cast<size_t>(&slot - slots.data()); }
  std::string name_of(const Slot& slot) const;
  // Its step count, present or still to be made, is in the memory of its device.
  bool counts_on_device(const Slot& slot) const;

  const RuleInfo& rule;
  const std::string owner;     // class name, for messages
  PyObject* groups = nullptr;  // of the call in progress
  std::vector<Slot> slots;
  std::vector<DevicePlace> devices;  // [0]: the CPU; one more for each device met
  bool any_on_cpu = false;
  bool device_counts = false;  // step counts that are still to be made belong in device memory
  int64_t builds = 0;

 private:
  void build_slot(Slot& slot, PyObject* state);
  void read_state(Slot& slot, SeenTensor& entry, PyObject* object, PyObject* key);
  int32_t device_of(const at::Tensor& param);

  Objects objects_;
  SeenTensors seen_;
  std::vector<GroupReader> readers_;
};

}  // namespace braze
