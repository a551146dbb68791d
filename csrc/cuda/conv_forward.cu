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
  ConvForwardArgument argument = {};
  argument.input = args.input;
  argument.pixels = conv_pixels(s, false);
  argument.weight = args.weight;
  argument.result = args.output;
  argument.kernel = s.kernel;
  argument.depth = static_cast<int32_t>(s.c);
  argument.width = static_cast<int32_t>(s.k);
  argument.weight_row = static_cast<int32_t>(s.taps() * (s.c / 8));
  argument.partials = scratch.workspace;
  argument.tickets = scratch.tickets;
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
