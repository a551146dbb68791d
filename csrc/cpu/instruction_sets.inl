// Includes BRAZE_LOOPS once for each instruction set, in a namespace of its name; which one runs is
// decided when the process starts, never at build time. BRAZE_FOR_EACH_ISA lists something for
// each, in the order of active_instruction_set().

#define BRAZE_ISA baseline
#define BRAZE_TARGET
#include BRAZE_LOOPS
#undef BRAZE_ISA
#undef BRAZE_TARGET

#if defined(__x86_64__) && !defined(BRAZE_BASELINE_ONLY)
#define BRAZE_F16C
#define BRAZE_ISA avx2
#define BRAZE_TARGET __attribute__((target("avx2,fma,f16c")))
#include BRAZE_LOOPS
#undef BRAZE_ISA
#undef BRAZE_TARGET

#if defined(__clang__)
#define BRAZE_AVX512_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#else  // gcc prefers half-width vectors unless told otherwise
#define BRAZE_AVX512_TARGET \
  "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
#define BRAZE_AVX512
#define BRAZE_ISA avx512
#define BRAZE_TARGET __attribute__((target(BRAZE_AVX512_TARGET)))
#include BRAZE_LOOPS
#undef BRAZE_ISA
#undef BRAZE_TARGET

#define BRAZE_AVX512BF16
#define BRAZE_ISA avx512_bf16
#define BRAZE_TARGET __attribute__((target(BRAZE_AVX512_TARGET ",avx512bf16")))
#include BRAZE_LOOPS
#undef BRAZE_ISA
#undef BRAZE_TARGET
#undef BRAZE_AVX512BF16
#undef BRAZE_AVX512
#undef BRAZE_F16C

#define BRAZE_FOR_EACH_ISA(what) {what(baseline), what(avx2), what(avx512), what(avx512_bf16)}
#else
#define BRAZE_FOR_EACH_ISA(what) {what(baseline)}
#endif
