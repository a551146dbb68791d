#include "batch_norm_backward_choice.cuh"

namespace braze::cuda {
namespace {

struct ApplyGrad {
  static constexpr bool kReduces = false;
  template <class S, int kInputs, class Mode>
  static auto kernel() {
    return batch_norm_apply_grad_kernel<S, kInputs, Mode>;
  }
};

}  // namespace

cudaError_t batch_norm_apply_grad(const BackwardArgs& args, cudaStream_t stream) {
  if (args.shape.numel() == 0) return cudaSuccess;
  return choose<ApplyGrad>(
      args, [&](auto kernel, const BackwardArgument& argument, const NormLaunch& launch, size_t) {
        return BRAZE_LAUNCH(kernel, launch.blocks, launch.threads, 0, stream, argument);
      });
}

}  // namespace braze::cuda
