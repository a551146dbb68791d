// The CUDA column of the launch table: batch normalisation.
#include "launch.h"
#include "scratch_cuda.h"

namespace braze {
namespace {

constexpr const char* kOwner = "batch_norm";

template <class Launch>
void run(int device, const char* what, Launch launch) {
  run_on_cuda(kOwner, device, what, launch);
}

template <class Args, class Launch>
void reduce_with(int device, const Args& args, const char* what, Launch launch) {
  const auto size_of = [](const Args& a, auto& size) { return cuda::batch_norm_scratch(a, size); };
  reduce_with(kOwner, device, args, what, size_of, launch);
}

}  // namespace

template <>
void launch_on_cuda(int device, const at::Tensor&, const StatisticsArgs& args) {
  reduce_with(device, args, "the statistics", cuda::batch_norm_statistics);
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const CombineArgs& args) {
  reduce_with(device, args, "the statistics", cuda::batch_norm_combine);
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const ApplyArgs& args) {
  run(device, "the forward pass",
      [&](cudaStream_t stream) { return cuda::batch_norm_apply(args, stream); });
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const RunningApplyArgs& args) {
  run(device, "the forward pass",
      [&](cudaStream_t stream) { return cuda::batch_norm_apply(args, stream); });
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const ReduceArgs& args) {
  reduce_with(device, args, "the backward pass", cuda::batch_norm_reduce);
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const CoefficientsArgs& args) {
  run(device, "the backward pass",
      [&](cudaStream_t stream) { return cuda::batch_norm_coefficients(args, stream); });
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const ApplyGradArgs& args) {
  run(device, "the backward pass",
      [&](cudaStream_t stream) { return cuda::batch_norm_apply_grad(args, stream); });
}
template <>
void launch_on_cuda(int device, const at::Tensor& like, const BackwardArgs& args) {
  launch_on_cuda(device, like, ReduceArgs{args});
  if (args.writes_elements()) launch_on_cuda(device, like, ApplyGradArgs{args});
}

}  // namespace braze
