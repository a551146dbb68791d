// How every operation is launched on a CUDA device, and what it says when it cannot be.
#pragma once
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <string>

namespace braze {

// Raises unless `error` is cudaSuccess: "<owner>: launching <what> on cuda:<device> failed".
void check_launch(cudaError_t error, const std::string& owner, const char* what, int device);

// body(the device's current stream), with the device as the current one.
template <class Body>
void on_current_stream(int device, const Body& body) {
  const auto index = static_cast<c10::DeviceIndex>(device);
  const c10::cuda::CUDAGuard guard(index);
  body(c10::cuda::getCurrentCUDAStream(index).stream());
}

}  // namespace braze
