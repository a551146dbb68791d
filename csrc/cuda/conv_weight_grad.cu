#include <algorithm>

#include "conv_grid.h"
#include "conv_launch.h"
#include "conv_weight_grad.cuh"

namespace braze::cuda {
namespace {

template <class F>
cudaError_t choose(const ConvWeightGradArgs& args, F&& f) {
  const ConvShape& s = args.shape;
  if (!conv_fits(s)) return cudaErrorInvalidConfiguration;
  ConvWeightGradArgument argument = {};
  argument.input = args.input;
  argument.grad = args.grad;
  argument.pixels = conv_pixels(s, false);
  argument.kernel = s.kernel;
  argument.c = static_cast<int32_t>(s.c);
  argument.k = static_cast<int32_t>(s.k);
  argument.tiles_c = static_cast<uint32_t>((s.c + 63) / 64);
  argument.steps = (argument.pixels.count + kStepDepth - 1) / kStepDepth;
  const auto run = [&]<class S, int kRows>(S, std::integral_constant<int, kRows>) {
    const auto kernel = conv_weight_grad_kernel<S, kRows>;
    constexpr size_t kBytes = ConvWeightLayout<kRows>::kBytes;
    int64_t resident = 0;
    const cudaError_t error = resident_conv_blocks(kernel, kBytes, resident);
    if (error != cudaSuccess) return error;
    const int64_t tiles = (s.k + kRows - 1) / kRows * s.taps() * argument.tiles_c;
    if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
    argument.tiles = static_cast<uint32_t>(tiles);
    // Blocks that run at once, as near as whole tiles allow.
    argument.splits = static_cast<uint32_t>(
        std::clamp<int64_t>(resident / tiles, 1, std::max<int64_t>(argument.steps, 1)));
    return f(kernel, kBytes, argument);
  };
  const auto of_rows = [&](auto storage) {
    return s.k > 64 ? run(storage, std::integral_constant<int, 128>{})
                    : run(storage, std::integral_constant<int, 64>{});
  };
  return s.dtype == DType::bf16 ? of_rows(Bf16{}) : of_rows(F16{});
}

}  // namespace

cudaError_t conv_scratch(const ConvWeightGradArgs& args, NormScratchSize& size) {
  return choose(args, [&](auto, size_t, const ConvWeightGradArgument& argument) {
    const int64_t each = args.shape.k * args.shape.taps() * args.shape.c;
    size = {argument.splits * static_cast<size_t>(each) * sizeof(float), 0};
    return cudaSuccess;
  });
}

cudaError_t conv_weight_grad(const ConvWeightGradArgs& args, const NormScratch& scratch,
                             cudaStream_t stream) {
  return choose(args, [&](auto kernel, size_t shared, ConvWeightGradArgument& argument) {
    argument.partials = static_cast<float*>(scratch.workspace);
    const cudaError_t error = BRAZE_LAUNCH(kernel, argument.tiles * argument.splits, kConvThreads,
                                           shared, stream, argument);
    if (error != cudaSuccess) return error;
    const int64_t size = args.shape.k * args.shape.taps() * args.shape.c;
    const ConvSumArgument sum{argument.partials, args.result, argument.splits, size};
    const auto blocks =
        static_cast<unsigned>((size + 4 * kConvSumColumns - 1) / (4 * kConvSumColumns));
    return with_dtype(args.result_dtype, [&](auto storage) {
      using S = decltype(storage);
      if constexpr (std::is_same_v<S, double>) {
        return cudaErrorInvalidValue;
      } else {
        return BRAZE_LAUNCH(conv_sum_kernel<S>, blocks, kConvThreads, 0, stream, sum);
      }
    });
  });
}

}  // namespace braze::cuda
