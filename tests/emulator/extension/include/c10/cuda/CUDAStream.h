// Stands in for torch's header of this name in the emulated extension: the current stream of each
// emulated device.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace c10 {
using DeviceIndex = int8_t;
}

namespace c10::cuda {

class CUDAStream {
 public:
  explicit CUDAStream(cudaStream_t stream) : stream_(stream) {}
  cudaStream_t stream() const { return stream_; }

 private:
  cudaStream_t stream_;
};

CUDAStream getCurrentCUDAStream(DeviceIndex device = -1);
void set_current_stream(DeviceIndex device, cudaStream_t stream);

}  // namespace c10::cuda
