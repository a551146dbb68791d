#include "optimizer_cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/optimizer_launch.h"
#include "launch_cuda.h"

namespace braze {
namespace {

const float* scale_pointer(const at::Tensor* tensor) {
  return tensor == nullptr ? nullptr : static_cast<const float*>(tensor->const_data_ptr());
}

class CudaStep final : public DeviceStep {
 public:
  CudaStep(int device, std::string owner) : device_(device), owner_(std::move(owner)) {}

  // At the end of the process the driver may be gone; then there is nothing to free.
  ~CudaStep() override {
    try {
      const c10::cuda::CUDAGuard guard(index());
      launcher_.reset();
    } catch (const c10::Error&) {
    }
  }

  void launch(const Work& work, const Hypers& hypers, const DeviceScale& scale) override {
    const c10::cuda::CUDAGuard guard(index());
    const cuda::LossScale loss_scale = {scale_pointer(scale.grad_scale),
                                        scale_pointer(scale.found_inf)};
    const cudaError_t error = launcher_->step({work.tensors, work.generation}, hypers, loss_scale,
                                              c10::cuda::getCurrentCUDAStream(index()).stream());
    TORCH_CHECK(error != cudaErrorStreamCaptureUnsupported, owner_,
                ": the first step cannot be captured into a CUDA graph, for it allocates; run one ",
                "step on a side stream before the capture (warm-up)");
    check_launch(error, owner_, "the step", device_);
  }

 private:
  c10::DeviceIndex index() const { return static_cast<c10::DeviceIndex>(device_); }

  int device_;
  std::string owner_;
  std::unique_ptr<cuda::StepLauncher> launcher_ = std::make_unique<cuda::StepLauncher>();
};

}  // namespace

std::unique_ptr<DeviceStep> make_cuda_step(int device, const std::string& owner) {
  return std::make_unique<CudaStep>(device, owner);
}

bool cuda_is_capturing(int device) {
  const auto index = static_cast<c10::DeviceIndex>(device);
  const c10::cuda::CUDAGuard guard(index);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error =
      cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(index).stream(), &status);
  TORCH_CHECK(error == cudaSuccess, "CUDA does not answer on cuda:", device, ": ",
              cudaGetErrorString(error));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace braze
