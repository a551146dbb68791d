// StepPlan, part 4: no memory is written twice in a step, or read after it was written.
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "step_plan_active.h"

namespace braze {

std::string StepPlan::name_of(const Owner& owner) const {
  const std::string name = name_of(*owner.slot);
  if (owner.key == nullptr) return name;
  return std::string("state['") + PyUnicode_AsUTF8(owner.key) + "'] of " + name;
}

void StepPlan::check_overlap() {
  owners_.clear();
  footprints_.clear();
  spans_.clear();
  for (const Slot& slot : slots_) {
    if (slot.obstacle != nullptr) continue;
    const auto add = [&](PyObject* object, PyObject* key) {
      if (object == nullptr) return;
      footprints_.push_back(footprint(THPVariable_Unpack(object)));
      owners_.push_back({&slot, key});
    };
    add(slot.param.object, nullptr);
    for (int k = 0; k < max_states(); ++k) add(slot.state[k].object, state_key(k));
    add(slot.step.object, keys().step);
    add(slot.sum.object, keys().grad_sum);
  }
  const OverlapPair pair = find_overlap(footprints_);
  if (pair.first >= 0) {
    TORCH_CHECK_VALUE(false, owner_, ": ", name_of(owners_[static_cast<size_t>(pair.first)]),
                      " and ", name_of(owners_[static_cast<size_t>(pair.second)]),
                      " share memory, so a step would update it twice; remove one of them from ",
                      "the optimizer, or clone it");
  }
  for (const Footprint& f : footprints_) {
    if (f.base != f.end()) spans_.emplace_back(f.base, f.end());
  }
  std::sort(spans_.begin(), spans_.end());
  size_t kept = 0;
  for (size_t i = 1; i < spans_.size(); ++i) {
    if (spans_[i].first <= spans_[kept].second) {
      spans_[kept].second = std::max(spans_[kept].second, spans_[i].second);
    } else {
      spans_[++kept] = spans_[i];
    }
  }
  if (!spans_.empty()) spans_.resize(kept + 1);
}

// A gradient in memory that the step writes would be read half updated. Memory that nothing else
// refers to is safe, and most gradients are alone in their storage.
void StepPlan::refuse_overlapping_gradient(const Slot& slot, const at::Tensor& grad) const {
  if (grad.const_data_ptr() != slot.param.data && grad.storage().use_count() == 1) return;
  const Footprint reads = footprint(grad);
  const auto after =
      std::upper_bound(spans_.begin(), spans_.end(), std::make_pair(reads.base, ~uintptr_t{0}));
  const bool touches = (after != spans_.begin() && std::prev(after)->second > reads.base) ||
                       (after != spans_.end() && after->first < reads.end());
  if (reads.base == reads.end() || !touches) return;
  for (size_t i = 0; i < footprints_.size(); ++i) {
    if (find_overlap({footprints_[i], reads}).first < 0) continue;
    TORCH_CHECK_VALUE(false, owner_, ": the gradient of ", name_of(slot), " shares memory with ",
                      name_of(owners_[i]), ", which the step writes; assign a copy to .grad");
  }
}

}  // namespace braze
