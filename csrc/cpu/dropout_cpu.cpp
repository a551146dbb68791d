#include "dropout_cpu.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../math/convert.h"
#include "instruction_set.h"
#include "parallel.h"

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

// Threads share out pieces of this many elements, a multiple of every tile and step.
constexpr int64_t kThreadPiece = 16384;

}  // namespace

void dropout(const DropoutArgs& args, int threads) {
  DropoutArgs now = args;
  now.random = args.random.read();
  if (now.used != nullptr) {
    now.used[0] = static_cast<int64_t>(now.random.seed);
    now.used[1] = static_cast<int64_t>(now.random.offset);
  }
  const Kernel kernel = kKernels[active_instruction_set()];
  const int64_t pieces = (now.numel + kThreadPiece - 1) / kThreadPiece;
  in_parallel(threads_for(now.numel, pieces, threads), pieces, [&](int64_t begin, int64_t end) {
    kernel(now, begin * kThreadPiece, std::min(end * kThreadPiece, now.numel));
  });
}

}  // namespace braze::cpu
