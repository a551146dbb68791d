// What a step does to gradients before its rule, and to weights after it.
#pragma once
#include "arithmetic.h"

namespace braze {

// What multiplies gradients of this norm so that it is max_norm at most, as
// torch.nn.utils.clip_grad_norm_ has it; NaN where the norm is.
BRAZE_INLINE double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1 ? 1 : coefficient;
}

// A weight's running average: average + weight (p - average), from the nearer end, as torch.lerp.
template <class V>
BRAZE_INLINE V average_with(V average, V p, Element<V> weight) {
  const V distance = p - average;
  return weight < Element<V>(0.5) ? fused_multiply_add(V(weight), distance, average)
                                  : fused_multiply_add(V(weight - Element<V>(1)), distance, p);
}

}  // namespace braze
