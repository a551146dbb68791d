// The optimizer formulas, each written once, for CPU loops and CUDA kernels alike.
// Only IEEE operations and explicit fma: the same bits everywhere, as long as the compiler
// contracts nothing (-ffp-contract=off, -fmad=false). T is float (fp32 and 16-bit parameters) or
// double.
#pragma once
#include <cmath>

#include "qualifiers.h"

namespace braze {

BRAZE_INLINE float fused_multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
BRAZE_INLINE double fused_multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
BRAZE_INLINE float square_root(float a) { return ::sqrtf(a); }
BRAZE_INLINE double square_root(double a) { return ::sqrt(a); }

// Gradient penalties: l2 adds l2 * p, l1 adds l1 * sign(p), with sign(0) = 0.
template <class T>
BRAZE_INLINE T add_penalty(T g, T p, T l2, T l1) {
  const T signed_l1 = p > T(0) ? l1 : (p < T(0) ? -l1 : T(0));
  // Not just l2 * p with l2 = 0: that would turn an infinite p into NaN.
  return (l2 != T(0) ? fused_multiply_add(l2, p, g) : g) + signed_l1;
}

template <class T>
struct AdamArgs {
  T grad_scale;   // 1 / (loss scale * summed weights); negative to maximize
  T fold_weight;  // weight of the gradient that joins an accumulator
  T beta1, one_minus_beta1;
  T beta2, one_minus_beta2;
  T l2, l1;
  T param_decay;           // 1 - lr * weight_decay when decoupled, else 1
  T step_size;             // lr / (1 - beta1^t)
  T inv_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
  T eps;
};

// m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
// p = decay p - step_size m / (sqrt(v) / sqrt(1 - b2^t) + eps).
// One division: sqrt(v) is multiplied by the reciprocal of its correction, so that eps keeps
// torch's meaning.
template <bool kPenalty, bool kAmsgrad, class T>
BRAZE_INLINE void adam_update(T& p, T g, T& m, T& v, T& v_max, const AdamArgs<T>& a) {
  g *= a.grad_scale;
  if (kPenalty) g = add_penalty(g, p, a.l2, a.l1);
  const T decayed = p * a.param_decay;
  m = fused_multiply_add(a.beta1, m, a.one_minus_beta1 * g);
  v = fused_multiply_add(a.beta2, v, a.one_minus_beta2 * g * g);
  T second = v;
  if (kAmsgrad) {
    // A NaN on either side stays, as torch.maximum keeps it.
    v_max = v_max != v_max ? v_max : (v_max >= v ? v_max : v);
    second = v_max;
  }
  const T denominator = fused_multiply_add(square_root(second), a.inv_sqrt_correction2, a.eps);
  p = fused_multiply_add(-a.step_size, m / denominator, decayed);
}

// Each member rounded once, from the double it was computed in.
template <class To, class From>
AdamArgs<To> round_args(const AdamArgs<From>& a) {
  return {To(a.grad_scale),
          To(a.fold_weight),
          To(a.beta1),
          To(a.one_minus_beta1),
          To(a.beta2),
          To(a.one_minus_beta2),
          To(a.l2),
          To(a.l1),
          To(a.param_decay),
          To(a.step_size),
          To(a.inv_sqrt_correction2),
          To(a.eps)};
}

template <class T>
struct SgdArgs {
  T grad_scale;
  T fold_weight;
  T l2, l1;
  T momentum, one_minus_dampening;
  T lr;
};

template <class To, class From>
SgdArgs<To> round_args(const SgdArgs<From>& a) {
  return {To(a.grad_scale), To(a.fold_weight),         To(a.l2), To(a.l1),
          To(a.momentum),   To(a.one_minus_dampening), To(a.lr)};
}

// first: the buffer does not exist yet and starts as the gradient, undampened.
enum class Momentum { none, first, running };

// b = mu b + (1 - dampening) g;  p = p - lr (nesterov ? g + mu b : b).
template <Momentum kMomentum, bool kNesterov, bool kPenalty, class T>
BRAZE_INLINE void sgd_update(T& p, T g, T& buffer, const SgdArgs<T>& a) {
  g *= a.grad_scale;
  if (kPenalty) g = add_penalty(g, p, a.l2, a.l1);
  T direction = g;
  if (kMomentum != Momentum::none) {
    buffer = kMomentum == Momentum::first
                 ? g
                 : fused_multiply_add(a.momentum, buffer, a.one_minus_dampening * g);
    direction = kNesterov ? fused_multiply_add(a.momentum, buffer, g) : buffer;
  }
  p = fused_multiply_add(-a.lr, direction, p);
}

// sum = keep * sum + weight * g; the first micro-batch overwrites.
template <bool kFirst, class T>
BRAZE_INLINE T accumulate_gradient(T sum, T g, T weight, T keep) {
  return kFirst ? weight * g : fused_multiply_add(weight, g, keep * sum);
}

}  // namespace braze
