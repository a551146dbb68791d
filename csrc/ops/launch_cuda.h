// How every operation is launched on a CUDA device, and what it says when it cannot be.
#pragma once
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <string>

#include "../cuda/runtime.h"

namespace braze {

// Raises unless `error` is cudaSuccess: "<owner>: launching <what> on cuda:<device> failed".
void check_launch(cudaError_t error, const std::string& owner, const char* what, int device);

// A device as the current one, of torch's CUDA runtime and of libbraze_cuda's. Not c10's guard,
// whose header calls the runtime itself, which a binding does not link.
class OnDevice {
 public:
  explicit OnDevice(c10::DeviceIndex device) : OnDevice(Before{c10::cuda::ExchangeDevice(device)}) {
    check_launch(cuda::use_device(device), "braze", "work", device);  // raises: torch's is put back
  }
  // An error that is still there is told by the next call: this may run because of one.
  ~OnDevice() {
    try {
      c10::cuda::MaybeExchangeDevice(before_);
    } catch (const c10::Error&) {
    }
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  struct Before {
    c10::DeviceIndex index;
  };
  explicit OnDevice(Before before) : before_(before.index) {}

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
