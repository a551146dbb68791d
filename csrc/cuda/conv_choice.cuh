// Which of the kernels a convolution takes, the grid for it, and what both are given.
#pragma once
#include "batch_norm_launch.h"
#include "conv_gemm.cuh"

namespace braze::cuda {

// f(kernel, bytes of shared memory, grid). `result`: what the kernel stores; `wide`: in slabs of
// 128 channels, not of 64.
template <bool kForward, class F>
cudaError_t choose_conv(const ConvShape& shape, const ActivationShape& result, bool wide, F&& f) {
  if (!conv_fits(shape)) return cudaErrorInvalidConfiguration;
  const auto run = [&]<class S, int kColumns>(S, std::integral_constant<int, kColumns>) {
    const auto kernel = conv_kernel<S, kColumns, kForward>;
    constexpr size_t kBytes = ConvLayout<kColumns, kForward>::kBytes;
    int64_t resident = 0;
    const cudaError_t error = resident_conv_blocks(kernel, kBytes, resident);
    if (error != cudaSuccess) return error;
    return f(kernel, kBytes, make_conv_grid(result.per_channel(), result.c, kColumns, resident));
  };
  const auto of_width = [&](auto storage) {
    return wide ? run(storage, std::integral_constant<int, 128>{})
                : run(storage, std::integral_constant<int, 64>{});
  };
  return shape.dtype == DType::bf16 ? of_width(Bf16{}) : of_width(F16{});
}

template <bool kForward>
ConvArgumentOf<kForward> make_conv_argument(const ConvShape& s, const void* weight, void* result,
                                            const NormScratch& scratch) {
  ConvArgumentOf<kForward> argument = {};
  argument.pixels = conv_pixels(s, !kForward);
  argument.weight = weight;
  argument.result = result;
  argument.kernel = s.kernel;
  argument.depth = static_cast<int32_t>(kForward ? s.c : s.k);
  argument.width = static_cast<int32_t>(kForward ? s.k : s.c);
  argument.weight_row = static_cast<int32_t>(s.taps() * (s.c / 8));
  argument.partials = scratch.workspace;
  argument.tickets = scratch.tickets;
  return argument;
}

template <class Item>
NormScratchSize conv_scratch_of(const NormGrid& grid) {
  const size_t blocks = size_t{grid.groups} * grid.splits;
  return {blocks * static_cast<size_t>(grid.width) * sizeof(Item), norm_tickets(grid)};
}

}  // namespace braze::cuda
