#include "dropout_cpu.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "optimizer_cpu.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace braze::cpu {
namespace {

#define BRAZE_ISA baseline
#define BRAZE_TARGET
#include "dropout_loops.inl"
#undef BRAZE_ISA
#undef BRAZE_TARGET

#if defined(__x86_64__)
#define BRAZE_F16C
#define BRAZE_ISA avx2
#define BRAZE_TARGET __attribute__((target("avx2,fma,f16c")))
#include "dropout_loops.inl"
#undef BRAZE_ISA
#undef BRAZE_TARGET

#if defined(__clang__)
#define BRAZE_AVX512_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#else  // gcc prefers half-width vectors unless told otherwise
#define BRAZE_AVX512_TARGET \
  "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
#define BRAZE_AVX512
#define BRAZE_ISA avx512
#define BRAZE_TARGET __attribute__((target(BRAZE_AVX512_TARGET)))
#include "dropout_loops.inl"
#undef BRAZE_ISA
#undef BRAZE_TARGET

#define BRAZE_AVX512BF16
#define BRAZE_ISA avx512_bf16
#define BRAZE_TARGET __attribute__((target(BRAZE_AVX512_TARGET ",avx512bf16")))
#include "dropout_loops.inl"
#undef BRAZE_ISA
#undef BRAZE_TARGET
#endif

using Kernel = void (*)(const DropoutArgs&, int64_t, int64_t);

// The loops of the instruction set that is chosen for the whole library.
Kernel active_kernel() {
#if defined(__x86_64__)
  const std::string chosen = instruction_set();
  if (chosen == "avx2") return avx2::dropout_range;
  if (chosen == "avx512") return avx512::dropout_range;
  if (chosen == "avx512_bf16") return avx512_bf16::dropout_range;
#endif
  return baseline::dropout_range;
}

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
  const Kernel kernel = active_kernel();
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
