// How every operation is launched on a CUDA device, and what it says when it cannot be.
#pragma once
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <string>

namespace braze {

// Raises unless `error` is cudaSuccess: "<owner>: launching <what> on cuda:<device> failed".
void check_launch(cudaError_t error, const std::string& owner, const char* what, int device);

// A device as the current one. Not c10's guard, whose header calls the CUDA runtime, which only
// libbraze_cuda links.
class OnDevice {
 public:
  explicit OnDevice(c10::DeviceIndex device) : before_(c10::cuda::ExchangeDevice(device)) {}
  ~OnDevice() { c10::cuda::MaybeExchangeDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  c10::DeviceIndex before_;
};

// body(the device's current stream), with the device as the current one.
template <class Body>
void on_current_stream(int device, const Body& body) {
  const auto index = static_cast<c10::DeviceIndex>(device);
  const OnDevice guard(index);
  body(c10::cuda::getCurrentCUDAStream(index).stream());
}

}  // namespace braze
