#include "conv_choice.cuh"
#include "conv_launch.h"

namespace braze::cuda {
namespace {

template <class F>
cudaError_t choose(const ConvForwardArgs& args, F&& f) {
  const ConvShape& s = args.shape;
  return choose_conv<true>(s, s.output(), s.k > 64, f);
}

}  // namespace

cudaError_t conv_scratch(const ConvForwardArgs& args, NormScratchSize& size) {
  return choose(args, [&](auto, size_t, const NormGrid& grid) {
    size = conv_scratch_of<MomentsItem>(grid);
    return cudaSuccess;
  });
}

cudaError_t conv_forward(const ConvForwardArgs& args, const NormScratch& scratch,
                         cudaStream_t stream) {
  const ConvShape& s = args.shape;
  auto argument = make_conv_argument<true>(s, args.weight, args.output, scratch);
  argument.input = args.input;
  argument.statistics.shape = s.output();
  argument.statistics.channels = args.channels;
  argument.statistics.stats = args.stats;
  return choose(args, [&](auto kernel, size_t shared, const NormGrid& grid) {
    argument.grid = grid;
    return BRAZE_LAUNCH(kernel, dim3(grid.splits, grid.groups), kConvThreads, shared, stream,
                        argument);
  });
}

}  // namespace braze::cuda
