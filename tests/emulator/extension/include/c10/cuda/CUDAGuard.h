// Stands in for torch's header of this name in the emulated extension.
#pragma once
#include <cuda_runtime.h>

#include "CUDAStream.h"

namespace c10::cuda {

class CUDAGuard {
 public:
  explicit CUDAGuard(DeviceIndex device) {
    cudaGetDevice(&before_);
    cudaSetDevice(device);
  }
  ~CUDAGuard() { cudaSetDevice(before_); }
  CUDAGuard(const CUDAGuard&) = delete;
  CUDAGuard& operator=(const CUDAGuard&) = delete;

 private:
  int before_ = 0;
};

}  // namespace c10::cuda
