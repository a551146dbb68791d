// BRAZE_INLINE: a formula that must inline into its caller, on the host (whatever its instruction
// set) and in CUDA kernels.
#pragma once

#if defined(__CUDACC__)
#define BRAZE_INLINE __host__ __device__ __forceinline__
#else
#define BRAZE_INLINE inline __attribute__((always_inline))
#endif
