// PTX instructions that CUDA C++ has no function for, each under one name; no other file contains
// asm. Fragment layouts are those of the PTX ISA's tables for sm_80 and later; a GPU has yet to
// confirm them.
#pragma once
#include "device.cuh"

#if defined(BRAZE_EMULATOR)
#include "emulator/ptx_models.h"
#else

namespace braze::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

// The address with other values of some bits; both are in shared memory.
__device__ __forceinline__ void* flip_shared(const void* address, uint32_t bits) {
  return __cvta_shared_to_generic(shared_address(address) ^ bits);
}

// One 16-byte store to global memory; the address must be a multiple of 16. nvcc splits a plain one
// into four for some GPUs, and its store functions make a strong one, which memory may not merge.
__device__ __forceinline__ void store16(void* address, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// The same to shared memory.
__device__ __forceinline__ void store16_shared(void* address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(address)),
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

// The value, of which the compiler knows nothing.
__device__ __forceinline__ uint32_t computed_here(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Two numbers as bf16, the first in the lower half: rounded to nearest, negative ones to 0. NaN is
// 0x7fff.
__device__ __forceinline__ uint32_t relu_pair_bf16(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
// The same as fp16.
__device__ __forceinline__ uint32_t relu_pair_f16(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Starts a copy of 16 bytes, past registers and L1; both addresses are multiples of 16. The bytes
// are there for this thread after a wait, for others after a barrier that follows it.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}

// The same, or 16 zero bytes: then nothing is read, but the address must be one in the tensor.
__device__ __forceinline__ void cp_async16_or_zero(void* shared, const void* global, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(copy ? 16 : 0)
               : "memory");
}

// This thread's copies since its last commit become a group.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane l names row l % 8 of matrix l / 8, 16 bytes in shared
// memory; it receives elements 2 (l % 4) and the next of row l / 4 of each matrix.
__device__ __forceinline__ void ldmatrix_x4(const void* row, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void ldmatrix_x4_trans(const void* row, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a 16x16 (by rows), b 16x8 (by columns), both bf16. With g = lane / 4, t = lane % 4:
// a[0..3] = columns 2t, 2t+1 of rows g and g+8, then columns 2t+8, 2t+9 of the same rows;
// b[0..1] = rows 2t, 2t+1 and 2t+8, 2t+9 of column g; c[0..3] = columns 2t, 2t+1 of rows g, g+8.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for fp16.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace braze::cuda

#endif
