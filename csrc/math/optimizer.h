// The optimizer formulas, each written once, for CPU loops and CUDA kernels alike.
// Only IEEE operations and explicit fma: the same bits everywhere, as long as the compiler
// contracts nothing (-ffp-contract=off, -fmad=false). T is float (fp32 and 16-bit parameters) or
// double. Flags are plain arguments: where they are constants, the compiler folds them.
#pragma once
#include "arithmetic.h"

namespace braze {

// Gradient penalties: l2 adds l2 * p, l1 adds l1 * sign(p), with sign(0) = 0.
template <class T>
BRAZE_INLINE T add_penalty(T g, T p, T l2, T l1) {
  const T signed_l1 = p > T(0) ? l1 : (p < T(0) ? -l1 : T(0));
  // Not just l2 * p with l2 = 0: that would turn an infinite p into NaN.
  return (l2 != T(0) ? fused_multiply_add(l2, p, g) : g) + signed_l1;
}

// base^n, n >= 0, in double-double: within one unit in the last place, and the same bits on every
// machine, which pow does not promise.
BRAZE_INLINE double integer_power(double base, int64_t n) {
  double high = 1, low = 0, square = base, square_low = 0;
  for (; n > 0; n >>= 1) {
    if (n & 1) {
      const double product = high * square;
      const double error =
          ::fma(high, square_low, ::fma(low, square, ::fma(high, square, -product)));
      high = product + error;
      low = error - (high - product);
    }
    const double product = square * square;
    const double error =
        ::fma(square, square_low, ::fma(square_low, square, ::fma(square, square, -product)));
    square = product + error;
    square_low = error - (square - product);
  }
  return high;
}

// The options of an Adam step as the user gives them.
struct AdamRule {
  double lr, beta1, beta2, eps, weight_decay, l1;
  double sign;  // -1 to maximize
  bool decoupled;
};

struct BiasCorrection {
  double first;            // 1 - beta1^t
  double inv_sqrt_second;  // 1 / sqrt(1 - beta2^t)
};

// Of a whole step count; a fraction is dropped.
BRAZE_INLINE BiasCorrection bias_correction(double beta1, double beta2, double step) {
  const int64_t t = static_cast<int64_t>(step);
  return {1 - integer_power(beta1, t), 1 / ::sqrt(1 - integer_power(beta2, t))};
}

// Of a count with a fraction, as averaged states have, by the library's power: its last bit may
// differ between machines.
inline BiasCorrection fractional_bias_correction(double beta1, double beta2, double step) {
  return {1 - ::pow(beta1, step), 1 / ::sqrt(1 - ::pow(beta2, step))};
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
template <class T>
BRAZE_INLINE void adam_update(T& p, T g, T& m, T& v, T& v_max, const AdamArgs<T>& a, bool penalty,
                              bool amsgrad) {
  g *= a.grad_scale;
  if (penalty) g = add_penalty(g, p, a.l2, a.l1);
  const T decayed = p * a.param_decay;
  m = fused_multiply_add(a.beta1, m, a.one_minus_beta1 * g);
  v = fused_multiply_add(a.beta2, v, a.one_minus_beta2 * g * g);
  T second = v;
  if (amsgrad) {
    // A NaN on either side stays, as torch.maximum keeps it.
    v_max = v_max != v_max ? v_max : (v_max >= v ? v_max : v);
    second = v_max;
  }
  const T denominator = fused_multiply_add(square_root(second), a.inv_sqrt_correction2, a.eps);
  p = fused_multiply_add(-a.step_size, m / denominator, decayed);
}

// gradient_scale: 1 / (loss scale * summed weights).
BRAZE_INLINE AdamArgs<double> adam_args(const AdamRule& r, const BiasCorrection& c,
                                        double gradient_scale, double fold_weight) {
  return {r.sign * gradient_scale,
          fold_weight,
          r.beta1,
          1 - r.beta1,
          r.beta2,
          1 - r.beta2,
          r.decoupled ? 0 : r.weight_decay,
          r.l1,
          r.decoupled ? 1 - r.lr * r.weight_decay : 1,
          r.lr / c.first,
          c.inv_sqrt_second,
          r.eps};
}

// Each member rounded once, from the double it was computed in.
template <class To, class From>
BRAZE_INLINE AdamArgs<To> round_args(const AdamArgs<From>& a) {
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

// The options of an SGD step as the user gives them.
struct SgdRule {
  double lr, weight_decay, l1, momentum, dampening;
  double sign;  // -1 to maximize
};

// decayed: the buffer was multiplied by the momentum when the open window began.
BRAZE_INLINE SgdArgs<double> sgd_args(const SgdRule& r, bool decayed, double gradient_scale,
                                      double fold_weight) {
  return {r.sign * gradient_scale,
          fold_weight,
          r.weight_decay,
          r.l1,
          decayed ? 1.0 : r.momentum,
          decayed ? 1.0 : 1 - r.dampening,
          r.lr};
}

template <class To, class From>
BRAZE_INLINE SgdArgs<To> round_args(const SgdArgs<From>& a) {
  return {To(a.grad_scale), To(a.fold_weight),         To(a.l2), To(a.l1),
          To(a.momentum),   To(a.one_minus_dampening), To(a.lr)};
}

// first: the buffer does not exist yet and starts as the gradient, undampened.
enum class Momentum { none, first, running };

// b = mu b + (1 - dampening) g;  p = p - lr (nesterov ? g + mu b : b).
template <class T>
BRAZE_INLINE void sgd_update(T& p, T g, T& buffer, const SgdArgs<T>& a, Momentum momentum,
                             bool nesterov, bool penalty) {
  g *= a.grad_scale;
  if (penalty) g = add_penalty(g, p, a.l2, a.l1);
  T direction = g;
  if (momentum != Momentum::none) {
    buffer = momentum == Momentum::first
                 ? g
                 : fused_multiply_add(a.momentum, buffer, a.one_minus_dampening * g);
    direction = nesterov ? fused_multiply_add(a.momentum, buffer, g) : buffer;
  }
  p = fused_multiply_add(-a.lr, direction, p);
}

// sum = keep * sum + weight * g; the first micro-batch overwrites.
template <class T>
BRAZE_INLINE T accumulate_gradient(T sum, T g, T weight, T keep, bool first) {
  return first ? weight * g : fused_multiply_add(weight, g, keep * sum);
}

}  // namespace braze
