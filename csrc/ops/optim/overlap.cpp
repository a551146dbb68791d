#include "overlap.h"

#include <algorithm>

#include "../tensor_work.h"

namespace braze {

std::string WrittenMemory::name_of(const Parameters& parameters, const Region& region) {
  const std::string name = parameters.name_of(*region.slot);
  if (region.key == nullptr) return name;
  return std::string("state['") + PyUnicode_AsUTF8(region.key) + "'] of " + name;
}

void WrittenMemory::clear() {
  regions_.clear();
  footprints_.clear();
  spans_.clear();
}

void WrittenMemory::collect(const Parameters& parameters) {
  clear();
  for (const Slot& slot : parameters.slots) {
    if (slot.obstacle != nullptr) continue;
    const auto add = [&](const SeenTensor& entry, PyObject* key) {
      if (entry.tensor == nullptr) return;
      footprints_.push_back(footprint(*entry.tensor));
      regions_.push_back({&slot, key});
    };
    add(slot.param, nullptr);
    const std::vector<PyObject*>& state_keys = parameters.rule.state_keys;
    for (size_t k = 0; k < state_keys.size(); ++k) add(slot.state[k], state_keys[k]);
    add(slot.step, keys().step);
    add(slot.sum, keys().grad_sum);
    add(slot.average, keys().ema);
  }
  const OverlapPair pair = find_overlap(footprints_);
  if (pair.first >= 0) {
    const auto name = [&](int64_t region) {
      return name_of(parameters, regions_[static_cast<size_t>(region)]);
    };
    TORCH_CHECK_VALUE(false, parameters.owner, ": ", name(pair.first), " and ", name(pair.second),
                      " share memory, so a step would update it twice; remove one of them from ",
                      "the optimizer, or clone it");
  }
  for (const Footprint& f : footprints_) {
    if (f.base != f.end()) spans_.emplace_back(f.base, f.end());
  }
  std::sort(spans_.begin(), spans_.end());
  size_t last = 0;
  for (size_t i = 1; i < spans_.size(); ++i) {
    if (spans_[i].first <= spans_[last].second) {
      spans_[last].second = std::max(spans_[last].second, spans_[i].second);
    } else {
      spans_[++last] = spans_[i];
    }
  }
  if (!spans_.empty()) spans_.resize(last + 1);
}

void WrittenMemory::refuse_gradient(const Parameters& parameters, const Slot& slot,
                                    const at::Tensor& grad) const {
  // Memory that nothing else refers to is safe, and most gradients are alone in their storage.
  if (grad.const_data_ptr() != slot.param.data && grad.storage().use_count() == 1) return;
  const Footprint reads = footprint(grad);
  const auto after =
      std::upper_bound(spans_.begin(), spans_.end(), std::make_pair(reads.base, ~uintptr_t{0}));
  const bool touches = (after != spans_.begin() && std::prev(after)->second > reads.base) ||
                       (after != spans_.end() && after->first < reads.end());
  if (reads.base == reads.end() || !touches) return;
  for (size_t i = 0; i < footprints_.size(); ++i) {
    if (find_overlap({footprints_[i], reads}).first < 0) continue;
    TORCH_CHECK_VALUE(false, parameters.owner, ": the gradient of ", parameters.name_of(slot),
                      " shares memory with ", name_of(parameters, regions_[i]),
                      ", which the step writes; assign a copy to .grad");
  }
}

}  // namespace braze
