// PTX instructions that CUDA C++ has no function for, each under one name; no other file contains
// asm.
#pragma once
#include "device.cuh"

#if defined(BRAZE_EMULATOR)
#include "emulator/ptx_models.h"
#else

namespace braze::cuda {

// One 16-byte store to global memory; the address must be a multiple of 16. nvcc splits a plain one
// into four for some GPUs, and its store functions make a strong one, which memory may not merge.
__device__ __forceinline__ void store16(void* address, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Adds to a counter in global memory; returns what it was. Who finds this addition there sees what
// this thread has seen.
__device__ __forceinline__ unsigned int atomic_add_acq_rel(unsigned int* counter,
                                                           unsigned int value) {
  unsigned int before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(value)
               : "memory");
  return before;
}

}  // namespace braze::cuda

#endif
