// What each instruction set has to update a stretch of a tensor.
#pragma once
#include "../plan/gradient_sums.h"
#include "../plan/hyper.h"
#include "sets.h"

namespace braze::cpu {

struct OptimizerLoops {
  // Elements [begin, end) of one tensor, with its hyper-parameters among `hypers`. What `sums`
  // holds of the update is filled in, where it is not null. [rule]
  void (*update[Rules::kCount])(const TensorWork&, int64_t begin, int64_t end, const Hypers& hypers,
                                GradientSums* sums);
  // The gradients of these elements, those that are present times `weight`: their squares alone, or
  // all there is to know of them.
  void (*measure)(const TensorWork&, int64_t begin, int64_t end, double weight, bool all,
                  GradientSums& sums);
};

BRAZE_IN_SETS(extern const OptimizerLoops optimizer_loops;)
BRAZE_IN_BF16_SET(using avx512::optimizer_loops;)

}  // namespace braze::cpu
