#include "conv_choice.cuh"
#include "conv_launch.h"

namespace braze::cuda {
namespace {

template <class F>
cudaError_t choose(const ConvInputGradArgs& args, F&& f) {
  const ConvShape& s = args.shape;
  // Both d and x in tiles leave no room for wide slabs.
  return choose_conv<false>(s, s.input(), s.c > 64 && args.grad.coefficients == nullptr, f);
}

}  // namespace

cudaError_t conv_scratch(const ConvInputGradArgs& args, NormScratchSize& size) {
  size = {};
  if (args.input.stats == nullptr) return cudaSuccess;
  return choose(args, [&](auto, size_t, const NormGrid& grid) {
    size = conv_scratch_of<SumsItem<1>>(grid);
    return cudaSuccess;
  });
}

cudaError_t conv_input_grad(const ConvInputGradArgs& args, const NormScratch& scratch,
                            cudaStream_t stream) {
  const ConvShape& s = args.shape;
  auto argument = make_conv_argument<false>(s, args.weight, args.result, scratch);
  argument.input = args.input;
  argument.grad = args.grad;
  argument.norm.shape = s.input();
  argument.norm.input[0] = {args.input.x, args.input.stats};
  argument.norm.grad[0] = args.norm;
  argument.norm.count = static_cast<double>(s.input().per_channel());
  return choose(args, [&](auto kernel, size_t shared, const NormGrid& grid) {
    argument.grid = grid;
    return BRAZE_LAUNCH(kernel, dim3(grid.splits, grid.groups), kConvThreads, shared, stream,
                        argument);
  });
}

}  // namespace braze::cuda
