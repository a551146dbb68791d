#include "dropout_cuda.h"

#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <mutex>

#include "../cuda/dropout_launch.h"
#include "launch_cuda.h"

namespace braze {
namespace {

class CudaDropout final : public DropoutDevice {
 public:
  RandomState draw(int device, const std::optional<at::Generator>& generator) const override {
    const auto index = static_cast<c10::DeviceIndex>(device);
    const c10::cuda::CUDAGuard guard(index);
    auto* source = at::get_generator_or_default<at::CUDAGeneratorImpl>(
        generator, at::cuda::detail::getDefaultCUDAGenerator(index));
    at::PhiloxCudaState philox;
    {
      const std::lock_guard<std::mutex> lock(source->mutex_);
      philox = source->philox_cuda_state(4);  // torch counts in fours; another offset every time
    }
    RandomState state;
    if (philox.captured_) {
      state.seed_pointer = philox.seed_.ptr;
      state.offset_pointer = philox.offset_.ptr;
      state.offset = philox.offset_intragraph_;
    } else {
      state.seed = philox.seed_.val;
      state.offset = philox.offset_.val;
    }
    return state;
  }

  void run(int device, const DropoutArgs& args) const override {
    const auto index = static_cast<c10::DeviceIndex>(device);
    const c10::cuda::CUDAGuard guard(index);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(index).stream();
    check_launch(cuda::dropout(args, stream), "dropout", "a kernel", device);
  }
};

}  // namespace

const DropoutDevice& cuda_dropout() {
  static const CudaDropout dropout;
  return dropout;
}

}  // namespace braze
