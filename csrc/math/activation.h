// Activation functions and their derivatives, each written once, for CPU loops and CUDA kernels
// alike. T is float (fp32 and 16-bit tensors) or double. NaN gives NaN; at a kink the derivative is
// torch's.
#pragma once
#include "arithmetic.h"

namespace braze {

// In the order of kActivationNames in ops/activation.h.
enum class Activation : int32_t {
  identity,
  relu,
  relu6,
  leaky_relu,  // parameter: the slope below 0
  elu,         // parameter: alpha
  sigmoid,
  tanh,
  silu,
  gelu,
  gelu_tanh,
  hardswish,
  hardsigmoid,
  mish,
};
constexpr int kNumActivations = 13;

// Whether the derivative is one of two constants, so that one bit per element is all a backward
// pass needs: derivative_is_upper says which, upper_derivative and lower_derivative are the
// constants.
BRAZE_INLINE constexpr bool has_two_slopes(Activation a) {
  return a == Activation::relu || a == Activation::relu6 || a == Activation::leaky_relu ||
         a == Activation::hardsigmoid;
}

template <Activation kA, class T>
BRAZE_INLINE bool derivative_is_upper(T z) {
  static_assert(has_two_slopes(kA));
  if constexpr (kA == Activation::relu) return !(z <= T(0));
  if constexpr (kA == Activation::relu6) return !(z <= T(0)) && !(z >= T(6));
  if constexpr (kA == Activation::leaky_relu) return z > T(0);
  return z > T(-3) && z < T(3);
}

template <Activation kA, class T>
BRAZE_INLINE T upper_derivative() {
  return kA == Activation::hardsigmoid ? T(1) / T(6) : T(1);
}

template <Activation kA, class T>
BRAZE_INLINE T lower_derivative(T parameter) {
  return kA == Activation::leaky_relu ? parameter : T(0);
}

// sigmoid(z) and its derivative. From e^-|z|, so that where one of s and 1 - s is tiny, s (1 - s)
// has not lost it.
template <class T>
struct Logistic {
  T value, derivative;
};

template <class T>
BRAZE_INLINE Logistic<T> logistic(T z) {
  const T e = exponential(negative_magnitude(z));
  const T r = T(1) / (T(1) + e);
  const T smaller = e * r;
  return {z < T(0) ? smaller : r, smaller * r};
}

template <class T>
BRAZE_INLINE T clamp(T z, T low, T high) {
  const T raised = z < low ? low : z;
  return raised > high ? high : raised;
}

// gelu_tanh is z (1 + tanh(u / 2)) / 2 = z sigmoid(u) with u = 2 sqrt(2 / pi) (z + 0.044715 z^3).
template <class T>
BRAZE_INLINE T gelu_inner(T z) {
  const T root = T(1.59576912160573071176);
  return z * fused_multiply_add(root * T(0.044715) * z, z, root);
}

// y = activation(z).
template <Activation kA, class T>
BRAZE_INLINE T activate(T z, T parameter) {
  if constexpr (kA == Activation::relu) return z < T(0) ? T(0) : z;
  if constexpr (kA == Activation::relu6) return clamp(z, T(0), T(6));
  if constexpr (kA == Activation::leaky_relu) return z > T(0) ? z : z * parameter;
  if constexpr (kA == Activation::elu) {
    const T negative = z > T(0) ? T(0) : z;
    const T curve = parameter * exponential_minus_1(negative);
    return z > T(0) ? z : curve;
  }
  if constexpr (kA == Activation::sigmoid) return logistic(z).value;
  if constexpr (kA == Activation::tanh) return hyperbolic_tangent(z);
  if constexpr (kA == Activation::silu) return z * logistic(z).value;
  if constexpr (kA == Activation::gelu) return z * normal_cdf(z);
  if constexpr (kA == Activation::gelu_tanh) return z * logistic(gelu_inner(z)).value;
  if constexpr (kA == Activation::hardswish) {
    return z * (clamp(z + T(3), T(0), T(6)) / T(6));
  }
  if constexpr (kA == Activation::hardsigmoid) return clamp(z + T(3), T(0), T(6)) / T(6);
  if constexpr (kA == Activation::mish) {
    // tanh(log(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2); from 20 on it is 1 in any precision here.
    const T limit = sizeof(T) == 8 ? T(40) : T(20);
    const T e = exponential(z > limit ? limit : z);
    const T n = e * (e + T(2));
    return z * (n / (n + T(2)));
  }
  return z;
}

// dy/dz.
template <Activation kA, class T>
BRAZE_INLINE T activation_derivative(T z, T parameter) {
  if constexpr (has_two_slopes(kA)) {
    return derivative_is_upper<kA>(z) ? upper_derivative<kA, T>() : lower_derivative<kA>(parameter);
  }
  if constexpr (kA == Activation::elu) {
    const T slope = parameter * exponential(z > T(0) ? T(0) : z);
    return z > T(0) ? T(1) : slope;
  }
  if constexpr (kA == Activation::sigmoid) return logistic(z).derivative;
  if constexpr (kA == Activation::tanh) return T(4) * logistic(T(2) * z).derivative;
  if constexpr (kA == Activation::silu) {
    const Logistic<T> s = logistic(z);
    return fused_multiply_add(z, s.derivative, s.value);
  }
  if constexpr (kA == Activation::gelu) {
    const T density = T(0.39894228040143267794) * exponential(T(-0.5) * z * z);
    return fused_multiply_add(z, density, normal_cdf(z));
  }
  if constexpr (kA == Activation::gelu_tanh) {
    const T root = T(1.59576912160573071176);
    const T slope = fused_multiply_add(T(3) * T(0.044715) * root * z, z, root);
    const Logistic<T> s = logistic(gelu_inner(z));
    return fused_multiply_add(z * slope, s.derivative, s.value);
  }
  if constexpr (kA == Activation::hardswish) {
    const T middle = fused_multiply_add(z, T(1) / T(3), T(0.5));
    return z <= T(-3) ? T(0) : (z < T(3) ? middle : (z >= T(3) ? T(1) : z));
  }
  if constexpr (kA == Activation::mish) {
    const T limit = sizeof(T) == 8 ? T(40) : T(20);
    const T e = exponential(z > limit ? limit : z);
    const T n = e * (e + T(2));
    const T d = n + T(2);
    return n / d + (z > limit ? T(0) : z) * (T(4) * e * (e + T(1)) / (d * d));
  }
  return T(1);
}

// d = dy * dy/dz. Where the derivative is 0, d is 0 whatever dy is.
template <class T>
BRAZE_INLINE T two_slope_gradient(T dy, bool upper, T upper_slope, T lower_slope) {
  const T on_upper = upper_slope == T(0) ? T(0) : dy * upper_slope;
  const T on_lower = lower_slope == T(0) ? T(0) : dy * lower_slope;
  return upper ? on_upper : on_lower;
}

template <Activation kA, class T>
BRAZE_INLINE T activation_gradient(T dy, T z, T parameter) {
  if constexpr (kA == Activation::identity) return dy;
  if constexpr (has_two_slopes(kA)) {
    return two_slope_gradient(dy, derivative_is_upper<kA>(z), upper_derivative<kA, T>(),
                              lower_derivative<kA>(parameter));
  }
  return dy * activation_derivative<kA>(z, parameter);
}

}  // namespace braze
