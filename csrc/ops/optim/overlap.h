// No memory is written twice in a step, or read after it was written.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "../../plan/layout.h"
#include "parameters.h"

namespace braze {

// The memory that steps write: parameters and their states.
class WrittenMemory {
 public:
  // Raises ValueError if two of them share a byte.
  void collect(const Parameters& parameters);
  // Raises ValueError if a gradient is in this memory, for it would be read half updated.
  void refuse_gradient(const Parameters& parameters, const Slot& slot,
                       const at::Tensor& grad) const;
  void clear();

 private:
  struct Region {
    const Slot* slot;
    PyObject* key;  // of the state tensor; null: the parameter itself
  };
  static std::string name_of(const Parameters& parameters, const Region& region);

  std::vector<Region> regions_;
  std::vector<Footprint> footprints_;                   // [region]
  std::vector<std::pair<uintptr_t, uintptr_t>> spans_;  // the same, sorted and merged
};

}  // namespace braze
