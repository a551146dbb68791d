// Batch normalisation's arithmetic per channel, each formula written once, for CPU loops and CUDA
// kernels alike. Elements are summed in float (double for fp64) within blocks of limited size;
// everything here, across blocks and per channel, is double.
//
// Forward:  z = (x - mean) * weight / sqrt(var + eps) + bias, var biased over the N values of a
//           channel; running_var takes the unbiased one.
// Backward: with d = dy * activation'(z),  grad_bias = sum d,  grad_weight = sum d xhat,
//           dx = weight / sqrt(var + eps) * (d - grad_bias / N - xhat * grad_weight / N).
// (Ioffe and Szegedy, 2015.)
#pragma once
#include "arithmetic.h"

namespace braze {

// Sums of x - shift and of its square over `count` values. The shift is a number near the mean, so
// that the squares do not cancel. Any two can be merged, in double, without a division.
struct Moments {
  double shift = 0, count = 0, sum = 0, square = 0;
};

// One value of a block. The sums of a block are T's, in runs short enough for them.
template <class T>
BRAZE_INLINE void add_moment(T x, T shift, T& sum, T& square) {
  const T v = x - shift;
  sum += v;
  square = fused_multiply_add(v, v, square);
}

// The shift of a block, from the sum of a few of its values.
template <class T>
BRAZE_INLINE T make_shift(T sum, T count) {
  const T mean = sum / count;
  return mean - mean == T(0) ? mean : T(0);  // not an infinity, not a NaN
}

BRAZE_INLINE void merge_moments(Moments& into, const Moments& other) {
  if (into.count == 0) {
    into = other;
    return;
  }
  const double d = other.shift - into.shift;
  into.square = fused_multiply_add(d, fused_multiply_add(d, other.count, 2 * other.sum),
                                   into.square + other.square);
  into.sum = fused_multiply_add(d, other.count, into.sum + other.sum);
  into.count += other.count;
}

struct ChannelMoments {
  double mean, m2, count;  // m2: sum of (x - mean)^2
};

BRAZE_INLINE ChannelMoments channel_moments(const Moments& m) {
  if (m.count == 0) return {0, 0, 0};
  const double mean = m.sum / m.count;
  const double m2 = fused_multiply_add(-mean, m.sum, m.square);
  return {m.shift + mean, m2 < 0 ? 0 : m2, m.count};
}

// What another process found: as a block whose shift is its mean.
BRAZE_INLINE Moments moments_of(const ChannelMoments& m) { return {m.mean, m.count, 0, m.m2}; }

// What applying and differentiating need, one number each per channel. mean is rounded to T and
// mean_low is what rounding took away, so that x - mean is exact where it matters:
// z = (x - mean) * scale + shift.
template <class T>
struct BatchNormStats {
  T mean, mean_low, invstd, scale, shift;
};

template <class T>
BRAZE_INLINE BatchNormStats<T> make_stats(double mean, double variance, double eps, double weight,
                                          double bias) {
  const T rounded = static_cast<T>(mean);
  const double low = mean - static_cast<double>(rounded);
  const double invstd = 1 / square_root(variance + eps);
  const double scale = weight * invstd;
  // An infinite mean has no low part: inf - inf.
  const double finite_low = low == low ? low : 0;
  return {rounded, static_cast<T>(finite_low), static_cast<T>(invstd), static_cast<T>(scale),
          static_cast<T>(fused_multiply_add(-finite_low, scale, bias))};
}

// z of one element.
template <class T>
BRAZE_INLINE T normalize(T x, T mean, T scale, T shift) {
  return fused_multiply_add(x - mean, scale, shift);
}

BRAZE_INLINE double variance_of(const ChannelMoments& m) {
  return m.count > 0 ? m.m2 / m.count : 0;
}
BRAZE_INLINE double unbiased_variance_of(const ChannelMoments& m) { return m.m2 / (m.count - 1); }

// running = (1 - momentum) running + momentum value.
BRAZE_INLINE double update_running(double running, double value, double momentum) {
  return fused_multiply_add(momentum, value, (1 - momentum) * running);
}

// dx = d * on_grad + (x - mean) * on_input + constant.
template <class T>
struct BatchNormCoefficients {
  T on_grad, on_input, constant;
};

template <class T>
BRAZE_INLINE T input_gradient(T d, T x, T mean, T on_grad, T on_input, T constant) {
  return fused_multiply_add(d, on_grad, fused_multiply_add(x - mean, on_input, constant));
}
// The input's gradient under running statistics, which do not depend on x.
template <class T>
BRAZE_INLINE T input_gradient(T d, T on_grad) {
  return d * on_grad;
}

// One element of a block's sums.
template <class T>
BRAZE_INLINE void add_gradient(T d, T x, T mean, T& grad, T& grad_input) {
  grad += d;
  grad_input = fused_multiply_add(d, x - mean, grad_input);
}

struct BatchNormSums {
  double grad;        // sum of d
  double grad_input;  // sum of d (x - mean), with the unrounded mean
};

// From block sums, whose mean is rounded.
BRAZE_INLINE BatchNormSums make_sums(double grad, double grad_rounded_input, double mean_low) {
  return {grad, fused_multiply_add(-mean_low, grad, grad_rounded_input)};
}

// The gradient of the weight; that of the bias is sums.grad.
BRAZE_INLINE double weight_gradient(const BatchNormSums& sums, double invstd) {
  return sums.grad_input * invstd;
}

// Of a layer that normalised with its batch's own statistics over `count` values. One that used
// running statistics has {scale, 0, 0}.
template <class T>
BRAZE_INLINE BatchNormCoefficients<T> make_coefficients(const BatchNormSums& sums, double count,
                                                        const BatchNormStats<T>& stats) {
  const double scale = stats.scale, invstd = stats.invstd;
  const double on_input = -scale * invstd * invstd * (sums.grad_input / count);
  const double constant = fused_multiply_add(-on_input, static_cast<double>(stats.mean_low),
                                             -scale * (sums.grad / count));
  return {stats.scale, static_cast<T>(on_input), static_cast<T>(constant)};
}

template <class T>
BRAZE_INLINE BatchNormCoefficients<T> constant_coefficients(const BatchNormStats<T>& stats) {
  return {stats.scale, T(0), T(0)};
}

}  // namespace braze
