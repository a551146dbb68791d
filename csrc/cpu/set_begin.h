// Begins a translation unit that is compiled once per instruction set: BRAZE_SET is its name and
// namespace, BRAZE_LEVEL its index in active_instruction_set(); set_end.h ends it. The standard
// library comes first, because its functions may be shared with code that any machine runs; all
// else that is not in the namespace must be inlined.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BRAZE_AVX2 "avx2,fma,f16c"
#define BRAZE_AVX512 BRAZE_AVX2 ",avx512f,avx512bw,avx512dq,avx512vl"
#define BRAZE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BRAZE_USE(set) \
  BRAZE_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#else
#define BRAZE_USE(set) BRAZE_PRAGMA(GCC target(set))
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector is passed: all that takes one is inlined
#endif

#if BRAZE_LEVEL == 1
BRAZE_USE(BRAZE_AVX2)
#elif BRAZE_LEVEL == 2
BRAZE_USE(BRAZE_AVX512)
#elif BRAZE_LEVEL == 3
BRAZE_USE(BRAZE_AVX512 ",avx512bf16")
#endif
