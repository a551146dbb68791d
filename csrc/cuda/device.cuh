// The CUDA that kernel sources use beyond the language itself, each thing under one name: launches,
// shared memory, 16-byte accesses. tests/emulator defines the same names (and BRAZE_EMULATOR) to
// run the same sources on the CPU.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

#if !defined(BRAZE_EMULATOR)

#include <cooperative_groups.h>

// A large by-value kernel parameter that all threads index without a copy of their own.
#define BRAZE_GRID_CONSTANT(type) const __grid_constant__ type

// type name[count] in shared memory.
#define BRAZE_SHARED(type, name, count) __shared__ type name[count]

// type* name: the launch's dynamic shared memory, aligned to 128 bytes.
#define BRAZE_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char braze_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(braze_dynamic_shared)

// Launches and returns the launch's error (cudaError_t). A kernel with template arguments goes in
// parentheses.
#define BRAZE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__), cudaGetLastError())

// The same with all blocks at once, so that they may wait for each other in grid_sync().
#define BRAZE_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  ::braze::cuda::launch_cooperative(kernel, grid, block, shared_bytes,           \
                                    stream __VA_OPT__(, ) __VA_ARGS__)

namespace braze::cuda {

template <class... P, class... A>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                               cudaStream_t stream, const A&... arguments) {
  std::tuple<std::remove_cv_t<P>...> values(arguments...);
  return std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value..., nullptr};
        return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block,
                                           pointers, shared_bytes, stream);
      },
      values);
}

// Waits for every thread of every block; only in a cooperative launch.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// One 16-byte access; the address must be a multiple of 16.
__device__ __forceinline__ uint4 load16(const void* address) {
  return *static_cast<const uint4*>(address);
}

}  // namespace braze::cuda

#endif
