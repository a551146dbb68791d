// Activation functions and their derivatives, each written once, for CPU loops and CUDA kernels
// alike. T is float (fp32 and 16-bit tensors) or double. NaN gives NaN; at a kink the derivative is
// torch's. A vector of either will do as well (cpu/simd.h), in formulas that select() instead of
// branching. A new activation is a line of the list and a Formula.
#pragma once
#include <type_traits>

#include "arithmetic.h"

namespace braze {

// What the derivative is: 1, one of two constants, or a function of z. Of two constants, one bit
// per element is all that a backward pass needs.
enum class Slope : int32_t { one, two, curved };

// X(name, slope, what torch computes of a tensor z). The last is for csrc/ops, where it is
// differentiated twice; nothing here expands it.
#define BRAZE_ACTIVATIONS(X)                                                                \
  X(identity, one, z)                                                                       \
  X(relu, two, at::relu(z))                                                                 \
  X(relu6, two, at::hardtanh(z, 0, 6))                                                      \
  X(leaky_relu, two, at::leaky_relu(z, parameter)) /* parameter: the slope below 0 */       \
  X(elu, curved, at::elu(z, parameter))            /* parameter: alpha */                   \
  X(sigmoid, curved, at::sigmoid(z))                                                        \
  X(tanh, curved, at::tanh(z))                                                              \
  X(silu, curved, at::silu(z))                                                              \
  X(gelu, curved, at::gelu(z))                                                              \
  X(gelu_tanh, curved, at::gelu(z, "tanh"))                                                 \
  X(hardswish, curved, at::hardswish(z))                                                    \
  /* at::hardsigmoid has no second derivative, and a first one that is rounded to float. */ \
  X(hardsigmoid, two, at::hardtanh(z + 3, 0, 6) / 6)                                        \
  X(mish, curved, at::mish(z))                                                              \
  X(hardtanh, two, at::hardtanh(z))                                                         \
  X(softplus, curved, at::softplus(z))

enum class Activation : int32_t {
#define BRAZE_ENUMERATOR(name, slope, torch) name,
  BRAZE_ACTIVATIONS(BRAZE_ENUMERATOR)
#undef BRAZE_ENUMERATOR
};

// In the order of the enumerators.
constexpr const char* kActivationNames[] = {
#define BRAZE_NAME(name, slope, torch) #name,
    BRAZE_ACTIVATIONS(BRAZE_NAME)
#undef BRAZE_NAME
};
constexpr int kNumActivations = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

BRAZE_INLINE constexpr Slope slope_of(Activation activation) {
  switch (activation) {
#define BRAZE_CASE(name, slope, torch) \
  case Activation::name: return Slope::slope;
    BRAZE_ACTIVATIONS(BRAZE_CASE)
#undef BRAZE_CASE
  }
  return Slope::one;
}
BRAZE_INLINE constexpr bool has_two_slopes(Activation a) { return slope_of(a) == Slope::two; }
BRAZE_INLINE constexpr bool is_curved(Activation a) { return slope_of(a) == Slope::curved; }
BRAZE_INLINE constexpr bool is_not_curved(Activation a) { return !is_curved(a); }
BRAZE_INLINE constexpr bool is_any(Activation) { return true; }

// body(constant), where the constant's value is the activation: the one dispatcher. Activations
// that are not kOf must not be given, and have no code.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // the body is the host's or the device's, as its caller is
#endif
template <bool (*kOf)(Activation) = is_any, class Body>
BRAZE_INLINE decltype(auto) with_activation(Activation activation, Body&& body) {
  switch (activation) {
#define BRAZE_CASE(name, slope, torch)                                     \
  case Activation::name:                                                   \
    if constexpr (kOf(Activation::name)) {                                 \
      return body(std::integral_constant<Activation, Activation::name>{}); \
    } else {                                                               \
      break;                                                               \
    }
    BRAZE_ACTIVATIONS(BRAZE_CASE)
#undef BRAZE_CASE
  }
  __builtin_unreachable();
}

// value(z, parameter), and of a curved one derivative(z, parameter); of one with two slopes
// is_upper(z), which tells whether the derivative is the upper one, and the two.
template <Activation kA, class T>
struct Formula;

template <class T>
struct SlopesOneAndZero {
  static BRAZE_INLINE Element<T> upper() { return 1; }
  static BRAZE_INLINE Element<T> lower(Element<T>) { return 0; }
};

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
  return {select(z < T(0), smaller, r), smaller * r};
}

template <class T>
BRAZE_INLINE T clamp(T z, T low, T high) {
  return smaller(high, larger(low, z));
}

template <class T>
struct Formula<Activation::identity, T> {
  static BRAZE_INLINE T value(T z, Element<T>) { return z; }
};

template <class T>
struct Formula<Activation::relu, T> : SlopesOneAndZero<T> {
  static BRAZE_INLINE T value(T z, Element<T>) { return larger(T(0), z); }
  static BRAZE_INLINE auto is_upper(T z) { return !(z <= T(0)); }
};

template <class T>
struct Formula<Activation::relu6, T> : SlopesOneAndZero<T> {
  static BRAZE_INLINE T value(T z, Element<T>) { return clamp(z, T(0), T(6)); }
  static BRAZE_INLINE auto is_upper(T z) { return !(z <= T(0)) && !(z >= T(6)); }
};

template <class T>
struct Formula<Activation::leaky_relu, T> : SlopesOneAndZero<T> {
  static BRAZE_INLINE T value(T z, Element<T> parameter) {
    return select(z > T(0), z, z * T(parameter));
  }
  static BRAZE_INLINE auto is_upper(T z) { return z > T(0); }
  static BRAZE_INLINE Element<T> lower(Element<T> parameter) { return parameter; }
};

template <class T>
struct Formula<Activation::elu, T> {
  static BRAZE_INLINE T value(T z, Element<T> parameter) {
    const T curve = T(parameter) * exponential_minus_1(smaller(T(0), z));
    return select(z > T(0), z, curve);
  }
  static BRAZE_INLINE T derivative(T z, Element<T> parameter) {
    const T slope = T(parameter) * exponential(smaller(T(0), z));
    return select(z > T(0), T(1), slope);
  }
};

template <class T>
struct Formula<Activation::sigmoid, T> {
  static BRAZE_INLINE T value(T z, Element<T>) { return logistic(z).value; }
  static BRAZE_INLINE T derivative(T z, Element<T>) { return logistic(z).derivative; }
};

template <class T>
struct Formula<Activation::tanh, T> {
  static BRAZE_INLINE T value(T z, Element<T>) { return hyperbolic_tangent(z); }
  static BRAZE_INLINE T derivative(T z, Element<T>) { return T(4) * logistic(T(2) * z).derivative; }
};

template <class T>
struct Formula<Activation::silu, T> {
  static BRAZE_INLINE T value(T z, Element<T>) { return z * logistic(z).value; }
  static BRAZE_INLINE T derivative(T z, Element<T>) {
    const Logistic<T> s = logistic(z);
    return fused_multiply_add(z, s.derivative, s.value);
  }
};

template <class T>
struct Formula<Activation::gelu, T> {
  static BRAZE_INLINE T value(T z, Element<T>) { return z * normal_cdf(z); }
  static BRAZE_INLINE T derivative(T z, Element<T>) {
    const T density = T(0.39894228040143267794) * exponential(T(-0.5) * z * z);
    return fused_multiply_add(z, density, normal_cdf(z));
  }
};

// z (1 + tanh(u / 2)) / 2 = z sigmoid(u) with u = 2 sqrt(2 / pi) (z + 0.044715 z^3).
template <class T>
struct Formula<Activation::gelu_tanh, T> {
  static BRAZE_INLINE T inner(T z) {
    const T root = T(1.59576912160573071176);
    return z * fused_multiply_add(root * T(0.044715) * z, z, root);
  }
  static BRAZE_INLINE T value(T z, Element<T>) { return z * logistic(inner(z)).value; }
  static BRAZE_INLINE T derivative(T z, Element<T>) {
    const T root = T(1.59576912160573071176);
    const T slope = fused_multiply_add(T(3) * T(0.044715) * root * z, z, root);
    const Logistic<T> s = logistic(inner(z));
    return fused_multiply_add(z * slope, s.derivative, s.value);
  }
};

template <class T>
struct Formula<Activation::hardswish, T> {
  static BRAZE_INLINE T value(T z, Element<T>) { return z * (clamp(z + T(3), T(0), T(6)) / T(6)); }
  static BRAZE_INLINE T derivative(T z, Element<T>) {
    const T middle = fused_multiply_add(z, T(1) / T(3), T(0.5));
    return select(z <= T(-3), T(0), select(z < T(3), middle, select(z >= T(3), T(1), z)));
  }
};

template <class T>
struct Formula<Activation::hardsigmoid, T> : SlopesOneAndZero<T> {
  static BRAZE_INLINE T value(T z, Element<T>) { return clamp(z + T(3), T(0), T(6)) / T(6); }
  static BRAZE_INLINE auto is_upper(T z) { return z > T(-3) && z < T(3); }
  static BRAZE_INLINE Element<T> upper() { return Element<T>(1) / 6; }
};

// With n = e^2 + 2 e of e = e^z, tanh(log(1 + e)) = n / (n + 2), which is 1 in any precision here
// from z = 20, or 40, on.
template <class T>
struct Formula<Activation::mish, T> {
  static constexpr Element<T> kLimit = sizeof(Element<T>) == 8 ? 40 : 20;
  static BRAZE_INLINE T value(T z, Element<T>) {
    const T e = exponential(smaller(T(kLimit), z));
    const T n = e * (e + T(2));
    return z * (n / (n + T(2)));
  }
  static BRAZE_INLINE T derivative(T z, Element<T>) {
    const T e = exponential(smaller(T(kLimit), z));
    const T n = e * (e + T(2));
    const T d = n + T(2);
    return n / d + select(z > T(kLimit), T(0), z) * (T(4) * e * (e + T(1)) / (d * d));
  }
};

template <class T>
struct Formula<Activation::hardtanh, T> : SlopesOneAndZero<T> {
  static BRAZE_INLINE T value(T z, Element<T>) { return clamp(z, T(-1), T(1)); }
  static BRAZE_INLINE auto is_upper(T z) { return !(z <= T(-1)) && !(z >= T(1)); }
};

// log(1 + e^z), and z itself above 20, as in torch.
template <class T>
struct Formula<Activation::softplus, T> {
  static BRAZE_INLINE T value(T z, Element<T>) {
    const T rest = logarithm_of_1_plus(exponential(negative_magnitude(z)));
    const T curve = select(z < T(0), rest, z + rest);
    return select(z > T(20), z, curve);
  }
  static BRAZE_INLINE T derivative(T z, Element<T>) {
    const T curve = logistic(z).value;
    return select(z > T(20), T(1), curve);
  }
};

// y = activation(z).
template <Activation kA, class T>
BRAZE_INLINE T activate(T z, Element<T> parameter) {
  return Formula<kA, T>::value(z, parameter);
}

template <Activation kA, class T>
BRAZE_INLINE auto derivative_is_upper(T z) {
  return Formula<kA, T>::is_upper(z);
}

// The two derivatives of an activation that has two, else 1.
template <class T>
struct Slopes {
  T upper, lower;
};

template <class T>
BRAZE_INLINE Slopes<T> slopes_of(Activation activation, T parameter) {
  return with_activation(activation, [=](auto constant) -> Slopes<T> {
    using F = Formula<decltype(constant)::value, T>;
    if constexpr (has_two_slopes(decltype(constant)::value)) {
      return {F::upper(), F::lower(parameter)};
    } else {
      return {T(1), T(1)};
    }
  });
}

// dy/dz.
template <Activation kA, class T>
BRAZE_INLINE T activation_derivative(T z, Element<T> parameter) {
  using F = Formula<kA, T>;
  if constexpr (is_curved(kA)) {
    return F::derivative(z, parameter);
  } else if constexpr (has_two_slopes(kA)) {
    return select(F::is_upper(z), T(F::upper()), T(F::lower(parameter)));
  } else {
    return T(1);
  }
}

// d = dy * dy/dz. Where the derivative is 0, d is 0 whatever dy is.
template <class T, class Upper>
BRAZE_INLINE T two_slope_gradient(T dy, Upper upper, Element<T> upper_slope,
                                  Element<T> lower_slope) {
  const T on_upper = upper_slope == 0 ? T(0) : dy * T(upper_slope);
  const T on_lower = lower_slope == 0 ? T(0) : dy * T(lower_slope);
  return select(upper, on_upper, on_lower);
}

template <Activation kA, class T>
BRAZE_INLINE T activation_gradient(T dy, T z, Element<T> parameter) {
  using F = Formula<kA, T>;
  if constexpr (is_curved(kA)) {
    return dy * F::derivative(z, parameter);
  } else if constexpr (has_two_slopes(kA)) {
    return two_slope_gradient(dy, F::is_upper(z), F::upper(), F::lower(parameter));
  } else {
    return dy;
  }
}

}  // namespace braze
