// One parallel region whose threads take contiguous shares of the work.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "threads.h"

namespace braze::cpu {

// With fewer elements than this, a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 16384;

// How many threads take work of `pieces` that no two share, where `threads` are allowed.
inline int threads_for(int64_t elements, int64_t pieces, int threads) {
  const int64_t useful = std::min(elements / kElementsPerThread, pieces);
  return usable_threads(static_cast<int>(std::clamp<int64_t>(useful, 1, std::max(threads, 1))));
}

// body(begin, end) for [0, pieces), and then, when all have done that, after(begin, end) for
// [0, columns) in whole cache lines.
template <class Body, class After>
void in_parallel(int threads, int64_t pieces, const Body& body, int64_t columns,
                 const After& after) {
  if (threads == 1) {
    body(int64_t{0}, pieces);
    after(int64_t{0}, columns);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t count = omp_get_num_threads(), own = omp_get_thread_num();
    body(pieces * own / count, pieces * (own + 1) / count);
    if (columns > 0) {
#pragma omp barrier
      const int64_t lines = (columns + 63) / 64;
      const int64_t end = std::min(lines * (own + 1) / count * 64, columns);
      after(std::min(lines * own / count * 64, columns), end);
    }
  }
}

template <class Body>
void in_parallel(int threads, int64_t pieces, const Body& body) {
  in_parallel(threads, pieces, body, 0, [](int64_t, int64_t) {});
}

}  // namespace braze::cpu
