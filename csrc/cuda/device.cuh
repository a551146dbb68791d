// The CUDA that kernel sources use beyond the language itself, each thing under one name: launches,
// shared memory, 16-byte accesses. tests/emulator defines the same names (and BRAZE_EMULATOR) to
// run the same sources on the CPU.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#if !defined(BRAZE_EMULATOR)

// A large by-value kernel parameter that all threads index without a copy of their own.
#define BRAZE_GRID_CONSTANT(type) const __grid_constant__ type

// type name[count] in shared memory.
#define BRAZE_SHARED(type, name, count) __shared__ type name[count]

// Launches and returns the launch's error (cudaError_t). A kernel with template arguments goes in
// parentheses.
#define BRAZE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__), cudaGetLastError())

namespace braze::cuda {

// One 16-byte access; the address must be a multiple of 16.
__device__ __forceinline__ uint4 load16(const void* address) {
  return *static_cast<const uint4*>(address);
}

}  // namespace braze::cuda

#endif
