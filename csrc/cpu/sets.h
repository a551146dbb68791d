// BRAZE_FOR_EACH_SET(name) lists what each instruction set has under a name of csrc/cpu/sets, in
// the order of active_instruction_set().
#pragma once

#if defined(__x86_64__) && !defined(BRAZE_BASELINE_ONLY)
#define BRAZE_FOR_EACH_SET(name) {baseline::name, avx2::name, avx512::name, avx512_bf16::name}
#define BRAZE_DECLARE_IN_SETS(declaration) \
  namespace baseline {                     \
  extern declaration;                      \
  }                                        \
  namespace avx2 {                         \
  extern declaration;                      \
  }                                        \
  namespace avx512 {                       \
  extern declaration;                      \
  }                                        \
  namespace avx512_bf16 {                  \
  extern declaration;                      \
  }
#else
#define BRAZE_FOR_EACH_SET(name) {baseline::name}
#define BRAZE_DECLARE_IN_SETS(declaration) \
  namespace baseline {                     \
  extern declaration;                      \
  }
#endif
