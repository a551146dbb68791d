// The CUDA runtime for those who do not link it: this library has one of its own, so that it serves
// every torch, whose runtime may be another.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <optional>
#include <string>

#include "../plan/interface.h"

namespace braze::cuda {

// That of libbraze_cuda.
BRAZE_API const char* interface();

// Each runtime has a current device of its own for each thread.
BRAZE_API cudaError_t use_device(int device);
// The capture that the stream is in, or none.
BRAZE_API cudaError_t find_capture(cudaStream_t stream, std::optional<unsigned long long>& capture);
BRAZE_API cudaError_t clear(void* memory, size_t bytes, cudaStream_t stream);
// Waits for the stream.
BRAZE_API cudaError_t copy_to_host(void* host, const void* memory, size_t bytes,
                                   cudaStream_t stream);
// Later calls do not see the last error.
BRAZE_API void forget_error();
// "description (name)".
BRAZE_API std::string describe(cudaError_t error);

}  // namespace braze::cuda
