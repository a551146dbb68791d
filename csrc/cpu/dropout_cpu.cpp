#include "dropout_cpu.h"

#include <algorithm>

#include "dropout_loops.h"
#include "instruction_set.h"
#include "parallel.h"

namespace braze::cpu {
namespace {

#define BRAZE_RANGE(set) set::dropout_range
constexpr decltype(&baseline::dropout_range) kKernels[] = BRAZE_FOR_EACH_SET(BRAZE_RANGE);

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
  const auto kernel = kKernels[active_instruction_set()];
  const int64_t pieces = (now.numel + kThreadPiece - 1) / kThreadPiece;
  in_parallel(threads_for(now.numel, pieces, threads), pieces, [&](int64_t begin, int64_t end) {
    kernel(now, begin * kThreadPiece, std::min(end * kThreadPiece, now.numel));
  });
}

}  // namespace braze::cpu
