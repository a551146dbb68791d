#include "optimizer_cuda.h"

#include <ATen/cuda/EmptyTensor.h>

#include <algorithm>

#include "../cuda/optimizer_launch.h"
#include "launch_cuda.h"

namespace braze {
namespace {

template <class T>
const T* pointer_to(const at::Tensor* tensor) {
  return tensor == nullptr ? nullptr : static_cast<const T*>(tensor->const_data_ptr());
}

int64_t chunks_of(const TensorWork& work) {
  return (work.numel + cuda::kChunkElements - 1) / cuda::kChunkElements;
}

class CudaStep final : public DeviceStep {
 public:
  CudaStep(int device, std::string owner) : device_(device), owner_(std::move(owner)) {}

  // At the end of the process the driver may be gone; then there is nothing to free.
  ~CudaStep() override {
    try {
      const OnDevice guard(index());
      launcher_.reset();
    } catch (const c10::Error&) {
    }
  }

  void launch(const Work& work, const Hypers& hypers, const DeviceScale& scale) override {
    const OnDevice guard(index());
    check(launcher_->step({work.tensors, work.generation}, hypers,
                          pointers(scale, scale.statistics), stream()),
          "the step");
  }

  Measured measure(const Work& work, const Hypers& hypers, double weight,
                   const DeviceScale& scale) override {
    const OnDevice guard(index());
    chunks_.clear();
    int64_t all_chunks = 0;
    for (const TensorWork& t : work.tensors) {
      chunks_.push_back(chunks_of(t));
      all_chunks += chunks_.back();
    }
    statistics_ = scale.statistics;
    allocate(std::max<int64_t>(all_chunks, 1));
    check(launcher_->measure(
              {work.tensors, work.generation}, hypers, weight, pointers(scale, true), statistics_,
              static_cast<cuda::MeasuredTotals*>(totals_.mutable_data_ptr()), stream()),
          "the pass over the gradients");
    return measured_;
  }

  std::vector<GradientSums> sums() override {
    const OnDevice guard(index());
    std::vector<GradientSums> result(chunks_.size());
    int64_t all_chunks = 0, chunk = 0;
    for (const int64_t count : chunks_) all_chunks += count;
    if (all_chunks == 0) return result;
    const int64_t columns = statistics_ ? cuda::kSumColumns : 1;
    std::vector<double> host(static_cast<size_t>(columns * all_chunks));
    check(cuda::copy_to_host(host.data(), workspaces_.back().const_data_ptr(),
                             host.size() * sizeof(double), stream()),
          "the copy of sums");
    for (size_t i = 0; i < chunks_.size(); ++i) {
      for (const int64_t end = chunk + chunks_[i]; chunk < end; ++chunk) {
        const auto column = [&](cuda::SumColumn c) {
          return c < columns ? host[static_cast<size_t>(c * all_chunks + chunk)] : 0;
        };
        result[i] += {.squares = column(cuda::kSquares),
                      .largest = column(cuda::kLargest),
                      .zeros = static_cast<int64_t>(column(cuda::kZeros)),
                      .non_finite = static_cast<int64_t>(column(cuda::kNonFinite)),
                      .update_squares = column(cuda::kUpdateSquares),
                      .param_squares = column(cuda::kParamSquares)};
      }
    }
    return result;
  }

 private:
  c10::DeviceIndex index() const { return static_cast<c10::DeviceIndex>(device_); }
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(index()).stream(); }

  void check(cudaError_t error, const char* what) const {
    TORCH_CHECK(error != cudaErrorStreamCaptureUnsupported, owner_,
                ": the first step cannot be captured into a CUDA graph, for it allocates; run one ",
                "step on a side stream before the capture (warm-up)");
    check_launch(error, owner_, what, device_);
  }

  at::Tensor empty(int64_t count) const {
    if (cuda_is_capturing(device_)) check(cudaErrorStreamCaptureUnsupported, "");
    return at::Tensor(at::detail::empty_cuda(
        {count}, at::kDouble, c10::Device(c10::DeviceType::CUDA, index()), std::nullopt));
  }

  // Graphs keep pointers to all of these.
  void allocate(int64_t chunks) {
    if (workspaces_.empty() || workspaces_.back().numel() < cuda::kSumColumns * chunks)
      workspaces_.push_back(empty(cuda::kSumColumns * chunks));
    if (totals_.defined()) return;
    totals_ = empty(2);
    const at::Tensor floats = totals_.view(at::kFloat);
    measured_ = {totals_.narrow(0, 0, 1), floats.select(0, 2), floats.narrow(0, 3, 1)};
  }

  cuda::StepScale pointers(const DeviceScale& scale, bool sums) const {
    cuda::StepScale result;
    result.grad_scale = pointer_to<float>(scale.grad_scale);
    result.found_inf = pointer_to<float>(scale.found_inf);
    result.squares = pointer_to<double>(scale.squares);
    if (scale.squares != nullptr) result.num_squares = static_cast<int32_t>(scale.squares->numel());
    result.skip_overflow = scale.skip_overflow;
    result.norm_scale = scale.norm_scale;
    result.max_norm = scale.max_norm;
    if (sums && !workspaces_.empty())
      result.sums = static_cast<double*>(workspaces_.back().mutable_data_ptr());
    return result;
  }

  int device_;
  std::string owner_;
  std::unique_ptr<cuda::StepLauncher> launcher_ = std::make_unique<cuda::StepLauncher>();
  // Of the last measure().
  std::vector<int64_t> chunks_;  // [tensor]
  bool statistics_ = false;
  std::vector<at::Tensor> workspaces_;  // the last one is in use
  at::Tensor totals_;                   // MeasuredTotals
  Measured measured_;                   // views of it
};

}  // namespace

std::unique_ptr<DeviceStep> make_cuda_step(int device, const std::string& owner) {
  return std::make_unique<CudaStep>(device, owner);
}

bool cuda_is_capturing(int device) {
  const auto index = static_cast<c10::DeviceIndex>(device);
  const OnDevice guard(index);
  std::optional<unsigned long long> capture;
  const cudaError_t error =
      cuda::find_capture(c10::cuda::getCurrentCUDAStream(index).stream(), capture);
  TORCH_CHECK(error == cudaSuccess, "CUDA does not answer on cuda:", device, ": ",
              cuda::describe(error));
  return capture.has_value();
}

}  // namespace braze
