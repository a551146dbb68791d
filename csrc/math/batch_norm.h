// Batch normalisation's arithmetic per channel, each formula written once, for CPU loops and CUDA
// kernels alike. Elements are summed in float (double for fp64) within blocks of limited size;
// everything here, across blocks and per channel, is double. V is a number, or a vector of numbers
// (cpu/simd.h): of neighbouring channels.
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
template <class V>
struct MomentsOf {
  V shift = 0;
  double count = 0;
  V sum = 0, square = 0;
};
using Moments = MomentsOf<double>;

// One value of a block. The sums of a block are T's, in runs short enough for them.
template <class V>
BRAZE_INLINE void add_moment(V x, V shift, V& sum, V& square) {
  const V v = x - shift;
  sum += v;
  square = fused_multiply_add(v, v, square);
}

// The shift of a block, from the sum of a few of its values.
template <class V>
BRAZE_INLINE V make_shift(V sum, V count) {
  const V mean = sum / count;
  return select(mean - mean == V(0), mean, V(0));  // not an infinity, not a NaN
}

template <class V>
BRAZE_INLINE void merge_moments(MomentsOf<V>& into,
                                const std::type_identity_t<MomentsOf<V>>& other) {
  if (into.count == 0) {
    into = other;
    return;
  }
  const V d = other.shift - into.shift, count = other.count;
  into.square = fused_multiply_add(d, fused_multiply_add(d, count, V(2) * other.sum),
                                   into.square + other.square);
  into.sum = fused_multiply_add(d, count, into.sum + other.sum);
  into.count += other.count;
}

template <class V>
struct ChannelMomentsOf {
  V mean, m2;  // m2: sum of (x - mean)^2
  double count;
};
using ChannelMoments = ChannelMomentsOf<double>;

template <class V>
BRAZE_INLINE ChannelMomentsOf<V> channel_moments(const MomentsOf<V>& m) {
  if (m.count == 0) return {V(0), V(0), 0};
  const V mean = m.sum / V(m.count);
  const V m2 = fused_multiply_add(-mean, m.sum, m.square);
  return {m.shift + mean, select(m2 < V(0), V(0), m2), m.count};
}

// What another process found: as a block whose shift is its mean.
template <class V = double>
BRAZE_INLINE MomentsOf<V> moments_of(const ChannelMomentsOf<V>& m) {
  return {m.mean, m.count, V(0), m.m2};
}

// What applying and differentiating need, one number each per channel. mean is rounded to T and
// mean_low is what rounding took away, so that x - mean is exact where it matters:
// z = (x - mean) * scale + shift.
template <class T>
struct BatchNormStats {
  T mean, mean_low, invstd, scale, shift;
};

// All but the mean is still to be rounded to T.
template <class T, class V>
BRAZE_INLINE BatchNormStats<V> make_stats_in_double(V mean, V variance, double eps, V weight,
                                                    V bias) {
  const V rounded = round_through<T>(mean);
  const V low = mean - rounded;
  const V invstd = V(1) / square_root(variance + V(eps));
  const V scale = weight * invstd;
  // An infinite mean has no low part: inf - inf.
  const V finite_low = select(low == low, low, V(0));
  return {rounded, finite_low, invstd, scale, fused_multiply_add(-finite_low, scale, bias)};
}

template <class T>
BRAZE_INLINE BatchNormStats<T> make_stats(double mean, double variance, double eps, double weight,
                                          double bias) {
  const BatchNormStats<double> s = make_stats_in_double<T>(mean, variance, eps, weight, bias);
  return {static_cast<T>(s.mean), static_cast<T>(s.mean_low), static_cast<T>(s.invstd),
          static_cast<T>(s.scale), static_cast<T>(s.shift)};
}

// z of one element.
template <class T>
BRAZE_INLINE T normalize(T x, T mean, T scale, T shift) {
  return fused_multiply_add(x - mean, scale, shift);
}

template <class V>
BRAZE_INLINE V variance_of(const ChannelMomentsOf<V>& m) {
  return m.count > 0 ? m.m2 / V(m.count) : V(0);
}
template <class V>
BRAZE_INLINE V unbiased_variance_of(const ChannelMomentsOf<V>& m) {
  return m.m2 / V(m.count - 1);
}

// running = (1 - momentum) running + momentum value.
template <class V>
BRAZE_INLINE V update_running(V running, std::type_identity_t<V> value, double momentum) {
  return fused_multiply_add(V(momentum), value, V(1 - momentum) * running);
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

template <class V>
struct BatchNormSumsOf {
  V grad;        // sum of d
  V grad_input;  // sum of d (x - mean), with the unrounded mean
};
using BatchNormSums = BatchNormSumsOf<double>;

// From block sums, whose mean is rounded.
template <class V>
BRAZE_INLINE BatchNormSumsOf<V> make_sums(V grad, V grad_rounded_input,
                                          std::type_identity_t<V> mean_low) {
  return {grad, fused_multiply_add(-mean_low, grad, grad_rounded_input)};
}

// The gradient of the weight; that of the bias is sums.grad.
template <class V>
BRAZE_INLINE V weight_gradient(const BatchNormSumsOf<V>& sums, std::type_identity_t<V> invstd) {
  return sums.grad_input * invstd;
}

// Of a layer that normalised with its batch's own statistics over `count` values. One that used
// running statistics has {scale, 0, 0}. Still to be rounded to T.
template <class V>
BRAZE_INLINE BatchNormCoefficients<V> make_coefficients_in_double(const BatchNormSumsOf<V>& sums,
                                                                  double count, V scale, V invstd,
                                                                  V mean_low) {
  const V on_input = -scale * invstd * invstd * (sums.grad_input / V(count));
  const V constant = fused_multiply_add(-on_input, mean_low, -scale * (sums.grad / V(count)));
  return {scale, on_input, constant};
}

template <class T>
BRAZE_INLINE BatchNormCoefficients<T> make_coefficients(const BatchNormSums& sums, double count,
                                                        const BatchNormStats<T>& stats) {
  const auto k =
      make_coefficients_in_double<double>(sums, count, stats.scale, stats.invstd, stats.mean_low);
  return {stats.scale, static_cast<T>(k.on_input), static_cast<T>(k.constant)};
}

template <class T>
BRAZE_INLINE BatchNormCoefficients<T> constant_coefficients(const BatchNormStats<T>& stats) {
  return {stats.scale, T(0), T(0)};
}

}  // namespace braze
