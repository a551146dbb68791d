// The CUDA column of the launch table: dropout.
#include <ATen/cuda/CUDAGeneratorImpl.h>

#include <mutex>

#include "../cuda/dropout_launch.h"
#include "launch.h"
#include "launch_cuda.h"

namespace braze {

template <>
void launch_on_cuda(int device, const at::Tensor&, const DrawArgs& args) {
  on_current_stream(device, [&](cudaStream_t) {
    auto* source = at::get_generator_or_default<at::CUDAGeneratorImpl>(
        args.generator,
        at::cuda::detail::getDefaultCUDAGenerator(static_cast<c10::DeviceIndex>(device)));
    at::PhiloxCudaState philox;
    {
      const std::lock_guard<std::mutex> lock(source->mutex_);
      philox = source->philox_cuda_state(4);  // torch counts in fours; another offset every time
    }
    args.state = {};
    if (philox.captured_) {
      args.state.seed_pointer = philox.seed_.ptr;
      args.state.offset_pointer = philox.offset_.ptr;
      args.state.offset = philox.offset_intragraph_;
    } else {
      args.state.seed = philox.seed_.val;
      args.state.offset = philox.offset_.val;
    }
  });
}

template <>
void launch_on_cuda(int device, const at::Tensor&, const DropoutArgs& args) {
  on_current_stream(device, [&](cudaStream_t stream) {
    check_launch(cuda::dropout(args, stream), "dropout", "a kernel", device);
  });
}

}  // namespace braze
