// The instruction sets that kernels are compiled for, each in a namespace of its name.
// BRAZE_IN_SETS(declarations) declares what each has, and BRAZE_IN_BF16_SET what avx512_bf16 has:
// some of its own, the rest avx512's. BRAZE_FOR_EACH_SET(what) lists what(namespace) in the order of
// active_instruction_set().
#pragma once

#define BRAZE_IN_BASELINE(...) \
  namespace baseline {         \
  __VA_ARGS__                  \
  }
#if defined(__x86_64__) && !defined(BRAZE_BASELINE_ONLY)
#define BRAZE_IN_SETS(...)       \
  BRAZE_IN_BASELINE(__VA_ARGS__) \
  namespace avx2 {               \
  __VA_ARGS__                    \
  }                              \
  namespace avx512 {             \
  __VA_ARGS__                    \
  }
#define BRAZE_IN_BF16_SET(...) \
  namespace avx512_bf16 {      \
  __VA_ARGS__                  \
  }
#define BRAZE_FOR_EACH_SET(what) {what(baseline), what(avx2), what(avx512), what(avx512_bf16)}
#else
#define BRAZE_IN_SETS(...) BRAZE_IN_BASELINE(__VA_ARGS__)
#define BRAZE_IN_BF16_SET(...)
#define BRAZE_FOR_EACH_SET(what) {what(baseline)}
#endif
