#include <cuda_runtime.h>

#include "runtime.h"

namespace braze::cuda {

const char* interface() { return kInterface; }

cudaError_t use_device(int device) { return cudaSetDevice(device); }

cudaError_t find_capture(cudaStream_t stream, std::optional<unsigned long long>& capture) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id);
  capture.reset();
  if (status != cudaStreamCaptureStatusNone) capture = id;
  return error;
}

cudaError_t clear(void* memory, size_t bytes, cudaStream_t stream) {
  return cudaMemsetAsync(memory, 0, bytes, stream);
}

cudaError_t copy_to_host(void* host, const void* memory, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cudaMemcpyAsync(host, memory, bytes, cudaMemcpyDeviceToHost, stream);
  return error != cudaSuccess ? error : cudaStreamSynchronize(stream);
}

void forget_error() { (void)cudaGetLastError(); }

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

}  // namespace braze::cuda
