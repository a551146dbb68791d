// Iteration order for operands whose strides differ.
#pragma once
#include <cstdint>
#include <vector>

#include "interface.h"

namespace braze {

// Sizes and one stride vector per operand, all in the same dimension order.
struct Layout {
  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides;  // [operand][dim]
};

// Drops dimensions of size 1, orders the rest by the first operand's strides (largest outermost),
// and merges neighbours that every operand walks as one. Element i then means the same logical
// index for all operands.
BRAZE_API void simplify(Layout& layout);

// True if no two logical indices share an address. Exact.
BRAZE_API bool is_non_overlapping(const std::vector<int64_t>& sizes,
                                  const std::vector<int64_t>& strides);

// Bytes [begin, end) that a tensor may touch, and how it walks them.
struct Footprint {
  uintptr_t base = 0;  // address of element 0
  int64_t itemsize = 1;
  std::vector<int64_t> sizes, strides;  // elements; strides are never negative
  bool dense = false;                   // touches every byte between its first and last
  BRAZE_API uintptr_t end() const;
};

// Indices of two footprints that share at least one byte, or {-1, -1}. Exact also for interleaved
// views.
struct OverlapPair {
  int64_t first = -1, second = -1;
};
BRAZE_API OverlapPair find_overlap(const std::vector<Footprint>& footprints);

}  // namespace braze
