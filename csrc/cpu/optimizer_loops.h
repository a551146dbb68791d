// What each instruction set has to update a stretch of a tensor.
#pragma once
#include "../plan/hyper.h"
#include "sets.h"

namespace braze::cpu {

struct OptimizerLoops {
  // Elements [begin, end) of one tensor, with its hyper-parameters among `hypers`. [rule]
  void (*update[Rules::kCount])(const TensorWork&, int64_t begin, int64_t end, const void* hypers);
};

BRAZE_IN_SETS(extern const OptimizerLoops optimizer_loops;)
BRAZE_IN_BF16_SET(using avx512::optimizer_loops;)

}  // namespace braze::cpu
