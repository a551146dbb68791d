// The CUDA column of the launch table: convolutions between batch norms.
#include "../cuda/conv_launch.h"
#include "launch.h"
#include "scratch_cuda.h"

namespace braze {
namespace {

template <class Args, class Launch>
void run(int device, const Args& args, const char* what, Launch launch) {
  const auto size_of = [](const Args& a, auto& size) { return cuda::conv_scratch(a, size); };
  reduce_with("conv_norm", device, args, what, size_of, launch);
}

}  // namespace

template <>
void launch_on_cuda(int device, const at::Tensor&, const ConvForwardArgs& args) {
  run(device, args, "a convolution", cuda::conv_forward);
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const ConvInputGradArgs& args) {
  run(device, args, "the gradient of a convolution's input", cuda::conv_input_grad);
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const ConvWeightGradArgs& args) {
  run(device, args, "the gradient of a convolution's weight", cuda::conv_weight_grad);
}

}  // namespace braze
