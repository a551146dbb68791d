// The operations that formulas are made of: IEEE ones and explicit fma, and elementary functions of
// float in these terms alone, so that they vectorise and give the same bits on every machine. Those
// of double are the machine's. V is a number, or a vector of numbers (cpu/simd.h) that has the same
// operators and functions.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "convert.h"
#include "qualifiers.h"

namespace braze {

BRAZE_INLINE float fused_multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
BRAZE_INLINE double fused_multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
BRAZE_INLINE float square_root(float a) { return ::sqrtf(a); }
BRAZE_INLINE double square_root(double a) { return ::sqrt(a); }

// The number that a V is, or is made of.
template <class V>
struct ElementOf {
  using Type = V;
};
template <class V>
  requires requires { typename V::Element; }
struct ElementOf<V> {
  using Type = typename V::Element;
};
template <class V>
using Element = typename ElementOf<V>::Type;

template <class T>
BRAZE_INLINE T select(bool condition, T a, T b) {
  return condition ? a : b;
}

// a > b ? a : b and a < b ? a : b: b if either is NaN.
template <class T>
BRAZE_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
BRAZE_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}

// x rounded to T and back.
template <class T>
BRAZE_INLINE double round_through(double x) {
  return static_cast<double>(static_cast<T>(x));
}

template <class V>
BRAZE_INLINE V negative_magnitude(V a) {
  if constexpr (sizeof(Element<V>) == 8) {
    return select(a < V(0), a, -a);
  } else {
    return float_from_bits(bits_from_float(a) | 0x80000000u);
  }
}

// 2^n for -126 <= n <= 127, n modulo 2^32.
template <class U>
BRAZE_INLINE auto power_of_two(U n) {
  return float_from_bits((n + 127u) << 23);
}

// x = n log(2) + r with |r| <= log(2) / 2 (and 1e-4 of that more), for |x| < 2^7. n: modulo 2^32.
template <class V, class U>
struct ReducedExponent {
  U n;
  V r;
};

template <class V>
BRAZE_INLINE auto reduce_exponent(V x) {
  const V magic = 0x1.8p23f;  // adding it rounds to an integer, which is then in the low bits
  const V sum = fused_multiply_add(x, V(0x1.715476p0f), magic);
  const V n = sum - magic;
  const V r = fused_multiply_add(n, V(0x1.05c61p-29f), fused_multiply_add(n, V(-0x1.62e43p-1f), x));
  const auto whole = bits_from_float(sum) - bits_from_float(magic);
  return ReducedExponent<V, std::remove_const_t<decltype(whole)>>{whole, r};
}

// x coefficients[0] + coefficients[1], times x, ...
template <class V, class... C>
BRAZE_INLINE V polynomial(V x, float first, C... rest) {
  V p = V(first);
  ((p = fused_multiply_add(p, x, V(rest))), ...);
  return p;
}

// e^r - 1 for |r| <= log(2) / 2, within 2^-23 of itself.
template <class V>
BRAZE_INLINE V small_exponential_minus_1(V r) {
  const V p = polynomial(r, 0x1.a19e1ap-13f, 0x1.6d748cp-10f, 0x1.111092p-7f, 0x1.5554aep-5f,
                         0x1.555556p-3f, 0.5f);
  return fused_multiply_add(p * r, r, r);
}

// e^x within 1.5 units in the last place, for x <= 40; underflow gives denormals and 0.
template <class V>
BRAZE_INLINE V exponential(V x) {
  const auto e = reduce_exponent(larger(V(-104.0f), x));
  // Two factors: 2^n alone may be below the normal numbers.
  return (V(1.0f) + small_exponential_minus_1(e.r)) * power_of_two(e.n + 64u) * V(0x1p-64f);
}
BRAZE_INLINE double exponential(double x) { return ::exp(x); }

// e^x - 1 for x <= 88, without cancellation.
template <class V>
BRAZE_INLINE V exponential_minus_1(V x) {
  const auto e = reduce_exponent(larger(V(-20.0f), x));
  const V scale = power_of_two(e.n);
  return fused_multiply_add(scale, small_exponential_minus_1(e.r), scale - V(1.0f));
}
BRAZE_INLINE double exponential_minus_1(double x) { return ::expm1(x); }

// log(1 + x) for 0 <= x <= 1, within 1.5 units in the last place: with s = x / (2 + x),
// 2 atanh(s) = x - x^2 / 2 + s (x^2 / 2 + s^2 (2 / 3 + 2 / 5 s^2 + ...)).
template <class V>
BRAZE_INLINE V logarithm_of_1_plus(V x) {
  const V s = x / (x + V(2.0f)), square = s * s, half = V(0.5f) * x * x;
  const V p =
      polynomial(square, 2.0f / 15, 2.0f / 13, 2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3);
  return x - fused_multiply_add(-s, fused_multiply_add(p, square, half), half);
}
BRAZE_INLINE double logarithm_of_1_plus(double x) { return ::log1p(x); }

// The normal distribution function: Phi(x) = erfc(-x / sqrt(2)) / 2, absolute error below 2^-23.
// Two minimax polynomials: erf(t) / t in t^2 below 1, log(erfc(t)) from 1 on.
template <class V>
BRAZE_INLINE V normal_cdf(V x) {
  const V scaled = x * V(0x1.6a09e6p-1f);
  const V t = select(scaled < V(0), -scaled, scaled);
  const V p = polynomial(t * t, 0x1.4ae4c6p-14f, -0x1.a485e8p-11f, 0x1.5419f4p-8f, -0x1.b7fbb4p-6f,
                         0x1.ce2d2p-4f, -0x1.81273ep-2f, 0x1.20dd74p0f);
  const V q =
      polynomial(smaller(V(4.0f), t), -0x1.6bd85p-16f, 0x1.cec656p-12f, -0x1.138cd8p-8f,
                 0x1.9d0318p-6f, -0x1.bc151ep-4f, -0x1.443566p-1f, -0x1.212c0ep0f, 0x1.8a5962p-13f);
  const V tail = select(t > V(4.0f), V(0.0f), V(0.5f) * exponential(q));
  const V upper = select(t < V(1.0f), fused_multiply_add(V(-0.5f), t * p, V(0.5f)), tail);
  return select(x < V(0), upper, V(1.0f) - upper);
}
BRAZE_INLINE double normal_cdf(double x) { return 0.5 * ::erfc(-x * 0.70710678118654752440); }

// tanh(x) from e^(-2|x|) - 1, accurate near 0 too.
template <class V>
BRAZE_INLINE V hyperbolic_tangent(V x) {
  const V magnitude = select(x < V(0), -x, x);
  const V e = exponential_minus_1(V(-2) * magnitude);
  const V positive = -e / (e + V(2));
  return select(x < V(0), -positive, positive);
}

}  // namespace braze
