// CUDA's additions to the language: qualifiers and vector types.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>

// The toolkit's own headers of these names are taken as read: cuda_bf16.h and the like then work on
// top of ours.
#define __HOST_DEFINES_H__
#define __VECTOR_TYPES_H__
#define __VECTOR_FUNCTIONS_H__
#define __DEVICE_TYPES_H__
#define __DRIVER_TYPES_H__
#define __CUDA_RUNTIME_API_H__
#define __CUDA_RUNTIME_H__

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
// Not poisoned and without red zones: BRAZE_SHARED is.
#define __shared__ thread_local

#define EMULATOR_VECTOR1(T, name) \
  struct name##1 { T x; };        \
  inline name##1 make_##name##1(T x) { return name##1 {x}; }
#define EMULATOR_VECTOR2(T, name, alignment)     \
  struct alignas(alignment) name##2 { T x, y; }; \
  inline name##2 make_##name##2(T x, T y) { return name##2 {x, y}; }
#define EMULATOR_VECTOR3(T, name) \
  struct name##3 { T x, y, z; };  \
  inline name##3 make_##name##3(T x, T y, T z) { return name##3 {x, y, z}; }
#define EMULATOR_VECTOR4(T, name, alignment)           \
  struct alignas(alignment) name##4 { T x, y, z, w; }; \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return name##4 {x, y, z, w}; }
#define EMULATOR_VECTORS(T, name, alignment2, alignment4) \
  EMULATOR_VECTOR1(T, name)                               \
  EMULATOR_VECTOR2(T, name, alignment2)                   \
  EMULATOR_VECTOR3(T, name)                               \
  EMULATOR_VECTOR4(T, name, alignment4)

#define EMULATOR_ALIGNED4(T, name)                  \
  struct alignas(16) name##4_16a { T x, y, z, w; }; \
  struct alignas(32) name##4_32a { T x, y, z, w; };

EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned int, uint, 8, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(long int, long, 16, 16)
EMULATOR_VECTORS(unsigned long int, ulong, 16, 16)
EMULATOR_VECTORS(long long int, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long int, ulonglong, 16, 16)
EMULATOR_VECTORS(double, double, 16, 16)

// CUDA 13 names these by their alignment.
EMULATOR_ALIGNED4(long int, long)
EMULATOR_ALIGNED4(unsigned long int, ulong)
EMULATOR_ALIGNED4(long long int, longlong)
EMULATOR_ALIGNED4(unsigned long long int, ulonglong)
EMULATOR_ALIGNED4(double, double)
#define __NV_SILENCE_DEPRECATION_BEGIN
#define __NV_SILENCE_DEPRECATION_END

#undef EMULATOR_ALIGNED4
#undef EMULATOR_VECTOR1
#undef EMULATOR_VECTOR2
#undef EMULATOR_VECTOR3
#undef EMULATOR_VECTOR4
#undef EMULATOR_VECTORS

// Of device_types.h; cuda_fp8.h uses it.
enum cudaRoundMode { cudaRoundNearest, cudaRoundZero, cudaRoundPosInf, cudaRoundMinInf };

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int vx = 1, unsigned int vy = 1, unsigned int vz = 1)
      : x(vx), y(vy), z(vz) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return uint3{x, y, z}; }
};
