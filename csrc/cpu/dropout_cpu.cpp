#include "dropout_cpu.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../math/convert.h"
#include "instruction_set.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace braze::cpu {
namespace {

#define BRAZE_LOOPS "dropout_loops.inl"
#include "instruction_sets.inl"

using Kernel = void (*)(const DropoutArgs&, int64_t, int64_t);

#define BRAZE_RANGE(isa) isa::dropout_range
constexpr Kernel kKernels[] = BRAZE_FOR_EACH_ISA(BRAZE_RANGE);

// A multiple of every tile and step; below two of them a second thread costs more than it saves.
constexpr int64_t kChunk = 16384;

}  // namespace

void dropout(const DropoutArgs& args, int threads) {
  DropoutArgs now = args;
  now.random = args.random.read();
  if (now.used != nullptr) {
    now.used[0] = static_cast<int64_t>(now.random.seed);
    now.used[1] = static_cast<int64_t>(now.random.offset);
  }
  const Kernel kernel = kKernels[active_instruction_set()];
  const int64_t chunks = (now.numel + kChunk - 1) / kChunk;
  threads = static_cast<int>(std::min<int64_t>(threads, chunks));
  if (threads > 1) threads = usable_threads(threads);
  if (threads <= 1) {
    kernel(now, 0, now.numel);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t begin = chunks * thread / count * kChunk;
    const int64_t end = std::min(chunks * (thread + 1) / count * kChunk, now.numel);
    kernel(now, begin, end);
  }
}

}  // namespace braze::cpu
