// Dropout's formulas, each written once, for CPU loops and CUDA kernels alike. T is float (fp32 and
// 16-bit tensors) or double.
//
// Mask index i belongs to lane i % 8 of the Philox4x32-7 block with counter (i / 8, offset) and key
// seed, each a pair of 32-bit words, low first; the lanes are the 16-bit halves of the four words,
// low first. It is kept iff its lane is at least the threshold, round(65536 p).
#pragma once
#include "activation.h"
#include "philox.h"

namespace braze {

constexpr int kDropoutRounds = 7;
constexpr int kLanesPerBlock = 8;
constexpr uint32_t kDropAll = 65536;  // the threshold that no lane reaches

struct RandomLanes {
  uint32_t word[4];
  BRAZE_INLINE uint32_t lane(int k) const {
    return k % 2 == 0 ? word[k / 2] & 0xffffu : word[k / 2] >> 16;
  }
};

BRAZE_INLINE RandomLanes random_lanes(uint64_t seed, uint64_t offset, uint64_t block) {
  RandomLanes lanes = {{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                        static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)}};
  philox4x32<kDropoutRounds, OneCounter>(lanes.word, static_cast<uint32_t>(seed),
                                         static_cast<uint32_t>(seed >> 32));
  return lanes;
}

BRAZE_INLINE bool is_kept(uint32_t lane, uint32_t threshold) {
  return static_cast<int32_t>(lane) >= static_cast<int32_t>(threshold);
}

// Of 0 <= p <= 1; halves to even.
BRAZE_INLINE uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(::nearbyint(p * 65536));
}

// y = kept ? scale x + shift : dropped.
template <class T>
struct DropoutTerms {
  T scale, shift, dropped;
};

// E[y] = x exactly, for the p that the threshold stands for. A shift of -0 leaves every product as
// it is, the sign of a zero too.
BRAZE_INLINE DropoutTerms<double> dropout_terms(uint32_t threshold) {
  if (threshold >= kDropAll) return {0, -0.0, 0};
  return {65536.0 / (65536.0 - threshold), -0.0, 0};
}

// Alpha dropout: dropped elements take SELU's lower limit -l, and scale and shift restore mean 0
// and variance 1 of a standardised input. (Klambauer et al.: Self-normalizing neural networks,
// 2017.) p = 1 gives zeros, as in torch.
BRAZE_INLINE DropoutTerms<double> alpha_dropout_terms(uint32_t threshold) {
  if (threshold >= kDropAll) return {0, -0.0, 0};
  const double limit = 1.7580993408473766, p = threshold / 65536.0;
  const double scale = 1 / ::sqrt(fused_multiply_add(limit * limit, p, 1.0) * (1 - p));
  return {scale, scale * limit * p, scale * limit * (p - 1)};
}

// What is linear in x: the gradient's map.
template <class T>
BRAZE_INLINE DropoutTerms<T> linear_part(const DropoutTerms<T>& terms) {
  return {terms.scale, T(-0.0), T(0)};
}

template <class To>
BRAZE_INLINE DropoutTerms<To> round_terms(const DropoutTerms<double>& terms) {
  return {static_cast<To>(terms.scale), static_cast<To>(terms.shift),
          static_cast<To>(terms.dropped)};
}

// A select, not a product with 0: what is dropped is gone, NaN and inf too.
template <class V, class Kept>
BRAZE_INLINE V drop(Kept kept, V x, const DropoutTerms<Element<V>>& terms) {
  return select(kept, fused_multiply_add(x, V(terms.scale), V(terms.shift)), V(terms.dropped));
}

// dropout(x) + residual, rounded once.
template <class V, class Kept>
BRAZE_INLINE V drop_and_add(Kept kept, V x, V residual, Element<V> scale) {
  return select(kept, fused_multiply_add(x, V(scale), residual), residual);
}

// dropout(y) without a shift, of y = activation(x), and its gradient for x.
template <class V, class Kept>
BRAZE_INLINE V drop_value(Kept kept, V y, Element<V> scale) {
  return select(kept, y * V(scale), V(0));
}
template <class V, class Kept>
BRAZE_INLINE V drop_gradient(Kept kept, V derivative, V grad, Element<V> scale) {
  return select(kept, grad * V(scale) * derivative, V(0));
}

// The same with the activation.
template <Activation kA, class V, class Kept>
BRAZE_INLINE V activate_and_drop(Kept kept, V x, Element<V> parameter, Element<V> scale) {
  return drop_value(kept, activate<kA>(x, parameter), scale);
}
template <Activation kA, class V, class Kept>
BRAZE_INLINE V activate_and_drop_grad(Kept kept, V x, V grad, Element<V> parameter,
                                      Element<V> scale) {
  const V scaled = grad * V(scale) * activation_derivative<kA>(x, parameter);
  return select(kept, scaled, V(0));
}

// Of ReLU, whose output says all: y > 0 means kept and x > 0.
template <class V>
BRAZE_INLINE V relu_and_drop_grad(V y, V grad, Element<V> scale) {
  return select(derivative_is_upper<Activation::relu>(y), grad * V(scale), V(0));
}

}  // namespace braze
