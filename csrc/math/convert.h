// 16-bit floating-point conversions on raw bits: round to nearest even, the same bits on every
// machine, but for NaNs: a GPU's instructions make 0x7fff of all.
#pragma once
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "qualifiers.h"

namespace braze {

BRAZE_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

BRAZE_INLINE uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

BRAZE_INLINE float float_from_bf16(uint16_t bits) {
  return float_from_bits(static_cast<uint32_t>(bits) << 16);
}

// Integer rounding, not vcvtneps2bf16: that instruction flushes denormals. NaN becomes the quiet
// NaN 0x7fc0.
BRAZE_INLINE uint16_t bf16_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

// Exact for every fp16 value: scale the shifted bits by 2^112; the compare restores inf and NaN.
BRAZE_INLINE float float_from_f16(uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#else
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const float scaled = float_from_bits(magnitude) * 0x1p112f;
  const uint32_t finite = bits_from_float(scaled);
  const uint32_t special = magnitude | 0x7f800000u;
  return float_from_bits(sign | ((half & 0x7c00u) == 0x7c00u ? special : finite));
#endif
}

// Round to nearest even; overflow gives inf; a NaN keeps its top payload bits and becomes quiet, as
// vcvtps2ph does.
BRAZE_INLINE uint16_t f16_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is denormal: adding 0.5 aligns the fp16 unit with fp32's last bit, and
  // the add rounds.
  const uint32_t denormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x1ffu);
  uint32_t result = magnitude < 0x38800000u ? denormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? nan : result;
  return static_cast<uint16_t>(sign | result);
#endif
}

// What memory holds, for overloads.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// What a stored type is computed in.
template <class S>
using Arithmetic = std::conditional_t<sizeof(S) == 8, double, float>;

BRAZE_INLINE float from_storage(float value) { return value; }
BRAZE_INLINE double from_storage(double value) { return value; }
BRAZE_INLINE float from_storage(Bf16 value) { return float_from_bf16(value.bits); }
BRAZE_INLINE float from_storage(F16 value) { return float_from_f16(value.bits); }
BRAZE_INLINE void to_storage(float value, float& out) { out = value; }
BRAZE_INLINE void to_storage(double value, double& out) { out = value; }
BRAZE_INLINE void to_storage(float value, Bf16& out) { out.bits = bf16_from_float(value); }
BRAZE_INLINE void to_storage(float value, F16& out) { out.bits = f16_from_float(value); }

}  // namespace braze
