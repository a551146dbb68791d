// The operations that formulas are made of: IEEE ones and explicit fma, and elementary functions of
// float in these terms alone, so that they vectorise and give the same bits on every machine. Those
// of double are the machine's.
#pragma once
#include <cmath>
#include <cstdint>

#include "convert.h"
#include "qualifiers.h"

namespace braze {

BRAZE_INLINE float fused_multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
BRAZE_INLINE double fused_multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
BRAZE_INLINE float square_root(float a) { return ::sqrtf(a); }
BRAZE_INLINE double square_root(double a) { return ::sqrt(a); }

BRAZE_INLINE float negative_magnitude(float a) {
  return float_from_bits(bits_from_float(a) | 0x80000000u);
}
BRAZE_INLINE double negative_magnitude(double a) { return a < 0 ? a : -a; }

// 2^n for -126 <= n <= 127.
BRAZE_INLINE float power_of_two(int32_t n) {
  return float_from_bits(static_cast<uint32_t>(n + 127) << 23);
}

// x = n log(2) + r with |r| <= log(2) / 2 (and 1e-4 of that more), for |x| < 2^7.
struct ReducedExponent {
  int32_t n;
  float r;
};

BRAZE_INLINE ReducedExponent reduce_exponent(float x) {
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, which is then in the low bits
  const float sum = fused_multiply_add(x, 0x1.715476p0f, magic);
  const float n = sum - magic;
  const float r = fused_multiply_add(n, 0x1.05c61p-29f, fused_multiply_add(n, -0x1.62e43p-1f, x));
  return {static_cast<int32_t>(bits_from_float(sum) - bits_from_float(magic)), r};
}

// e^r - 1 for |r| <= log(2) / 2, within 2^-23 of itself.
BRAZE_INLINE float small_exponential_minus_1(float r) {
  float p = fused_multiply_add(0x1.a19e1ap-13f, r, 0x1.6d748cp-10f);
  p = fused_multiply_add(p, r, 0x1.111092p-7f);
  p = fused_multiply_add(p, r, 0x1.5554aep-5f);
  p = fused_multiply_add(p, r, 0x1.555556p-3f);
  p = fused_multiply_add(p, r, 0.5f);
  return fused_multiply_add(p * r, r, r);
}

// e^x within 1.5 units in the last place, for x <= 40; underflow gives denormals and 0.
BRAZE_INLINE float exponential(float x) {
  const ReducedExponent e = reduce_exponent(x < -104.0f ? -104.0f : x);
  // Two factors: 2^n alone may be below the normal numbers.
  return (1.0f + small_exponential_minus_1(e.r)) * power_of_two(e.n + 64) * 0x1p-64f;
}
BRAZE_INLINE double exponential(double x) { return ::exp(x); }

// e^x - 1 for x <= 88, without cancellation.
BRAZE_INLINE float exponential_minus_1(float x) {
  const ReducedExponent e = reduce_exponent(x < -20.0f ? -20.0f : x);
  const float scale = power_of_two(e.n);
  return fused_multiply_add(scale, small_exponential_minus_1(e.r), scale - 1.0f);
}
BRAZE_INLINE double exponential_minus_1(double x) { return ::expm1(x); }

// log(1 + x) for 0 <= x <= 1, within 1.5 units in the last place: with s = x / (2 + x),
// 2 atanh(s) = x - x^2 / 2 + s (x^2 / 2 + s^2 (2 / 3 + 2 / 5 s^2 + ...)).
BRAZE_INLINE float logarithm_of_1_plus(float x) {
  const float s = x / (x + 2.0f), square = s * s, half = 0.5f * x * x;
  float p = fused_multiply_add(2.0f / 15, square, 2.0f / 13);
  p = fused_multiply_add(p, square, 2.0f / 11);
  p = fused_multiply_add(p, square, 2.0f / 9);
  p = fused_multiply_add(p, square, 2.0f / 7);
  p = fused_multiply_add(p, square, 2.0f / 5);
  p = fused_multiply_add(p, square, 2.0f / 3);
  return x - fused_multiply_add(-s, fused_multiply_add(p, square, half), half);
}
BRAZE_INLINE double logarithm_of_1_plus(double x) { return ::log1p(x); }

// The normal distribution function: Phi(x) = erfc(-x / sqrt(2)) / 2, absolute error below 2^-23.
// Two minimax polynomials: erf(t) / t in t^2 below 1, log(erfc(t)) from 1 on.
BRAZE_INLINE float normal_cdf(float x) {
  const float scaled = x * 0x1.6a09e6p-1f;
  const float t = scaled < 0 ? -scaled : scaled;
  const float s = t * t;
  float p = fused_multiply_add(0x1.4ae4c6p-14f, s, -0x1.a485e8p-11f);
  p = fused_multiply_add(p, s, 0x1.5419f4p-8f);
  p = fused_multiply_add(p, s, -0x1.b7fbb4p-6f);
  p = fused_multiply_add(p, s, 0x1.ce2d2p-4f);
  p = fused_multiply_add(p, s, -0x1.81273ep-2f);
  p = fused_multiply_add(p, s, 0x1.20dd74p0f);
  const float clamped = t > 4.0f ? 4.0f : t;
  float q = fused_multiply_add(-0x1.6bd85p-16f, clamped, 0x1.cec656p-12f);
  q = fused_multiply_add(q, clamped, -0x1.138cd8p-8f);
  q = fused_multiply_add(q, clamped, 0x1.9d0318p-6f);
  q = fused_multiply_add(q, clamped, -0x1.bc151ep-4f);
  q = fused_multiply_add(q, clamped, -0x1.443566p-1f);
  q = fused_multiply_add(q, clamped, -0x1.212c0ep0f);
  q = fused_multiply_add(q, clamped, 0x1.8a5962p-13f);
  const float tail = t > 4.0f ? 0.0f : 0.5f * exponential(q);
  const float upper = t < 1.0f ? fused_multiply_add(-0.5f, t * p, 0.5f) : tail;
  return x < 0 ? upper : 1.0f - upper;
}
BRAZE_INLINE double normal_cdf(double x) { return 0.5 * ::erfc(-x * 0.70710678118654752440); }

// tanh(x) from e^(-2|x|) - 1, accurate near 0 too.
template <class T>
BRAZE_INLINE T hyperbolic_tangent(T x) {
  const T magnitude = x < T(0) ? -x : x;
  const T e = exponential_minus_1(T(-2) * magnitude);
  const T positive = -e / (e + T(2));
  return x < T(0) ? -positive : positive;
}

}  // namespace braze
