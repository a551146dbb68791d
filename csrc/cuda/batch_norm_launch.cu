#include <algorithm>

#include "../math/hook.h"
#include "batch_norm_apply.cuh"
#include "batch_norm_launch.h"
#include "batch_norm_statistics.cuh"

namespace braze::cuda {
namespace {

template <class S>
cudaError_t statistics_launch(const StatisticsArgs& args, NormLaunch& launch) {
  int64_t resident = 0;
  if (const cudaError_t error = resident_blocks(batch_norm_statistics_kernel<S>, resident);
      error != cudaSuccess) {
    return error;
  }
  return make_norm_launch(args.shape, {kVector<S>, false, true, resident}, {args.x}, launch);
}

template <class S, int kInputs, bool kCurved, bool kMask>
cudaError_t launch_apply(const ApplyArgs& args, cudaStream_t stream) {
  const auto kernel = batch_norm_apply_kernel<S, kInputs, kCurved, kMask>;
  int64_t resident = 0;
  cudaError_t error = resident_blocks(kernel, resident);
  if (error != cudaSuccess) return error;
  NormLaunch launch;
  error = make_norm_launch(args.shape, {kApplyLanes<S, kMask>, kMask, false, resident},
                           {args.input[0].x, args.input[1].x, args.residual, args.y}, launch);
  if (error != cudaSuccess) return error;
  const ApplyArgument argument{args, launch.grid};
  return BRAZE_LAUNCH(kernel, launch.blocks, launch.threads, 0, stream, argument);
}

template <class S, int kInputs>
cudaError_t choose_apply(const ApplyArgs& args, cudaStream_t stream) {
  if (args.mask != nullptr) {
    return has_two_slopes(args.activation) ? launch_apply<S, kInputs, false, true>(args, stream)
                                           : cudaErrorInvalidValue;
  }
  return is_curved(args.activation) ? launch_apply<S, kInputs, true, false>(args, stream)
                                    : launch_apply<S, kInputs, false, false>(args, stream);
}

}  // namespace

cudaError_t batch_norm_scratch(const StatisticsArgs& args, NormScratchSize& size) {
  return with_dtype(args.shape.dtype, [&](auto storage) {
    NormLaunch launch;
    const cudaError_t error = statistics_launch<decltype(storage)>(args, launch);
    if (error != cudaSuccess) return error;
    size.workspace =
        size_t{launch.blocks} * static_cast<size_t>(launch.grid.width) * sizeof(MomentsItem);
    size.tickets = size_t{launch.grid.groups} + BRAZE_HOOK(batch_ticket, 1);
    return cudaSuccess;
  });
}

cudaError_t batch_norm_scratch(const CombineArgs&, NormScratchSize& size) {
  size = {0, 1};
  return cudaSuccess;
}

cudaError_t batch_norm_statistics(const StatisticsArgs& args, const NormScratch& scratch,
                                  cudaStream_t stream) {
  return with_dtype(args.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    NormLaunch launch;
    const cudaError_t error = statistics_launch<S>(args, launch);
    if (error != cudaSuccess) return error;
    const StatisticsArgument argument{
        args, launch.grid, static_cast<MomentsItem*>(scratch.workspace), scratch.tickets};
    return BRAZE_LAUNCH(batch_norm_statistics_kernel<S>, launch.blocks, launch.threads, 0, stream,
                        argument);
  });
}

cudaError_t batch_norm_combine(const CombineArgs& args, const NormScratch& scratch,
                               cudaStream_t stream) {
  // Even without channels there is a batch to count.
  const unsigned blocks = std::max(BRAZE_HOOK(channel_blocks, channel_blocks(args.shape.c)), 1u);
  const CombineArgument argument{args, scratch.tickets};
  return args.shape.dtype == DType::f64 ? BRAZE_LAUNCH(batch_norm_combine_kernel<double>, blocks,
                                                       kNormThreads, 0, stream, argument)
                                        : BRAZE_LAUNCH(batch_norm_combine_kernel<float>, blocks,
                                                       kNormThreads, 0, stream, argument);
}

cudaError_t batch_norm_from_running(const FromRunningArgs& args, cudaStream_t stream) {
  const unsigned blocks = channel_blocks(args.shape.c);
  if (blocks == 0) return cudaSuccess;
  return args.shape.dtype == DType::f64 ? BRAZE_LAUNCH(batch_norm_from_running_kernel<double>,
                                                       blocks, kNormThreads, 0, stream, args)
                                        : BRAZE_LAUNCH(batch_norm_from_running_kernel<float>,
                                                       blocks, kNormThreads, 0, stream, args);
}

cudaError_t batch_norm_apply(const ApplyArgs& args, cudaStream_t stream) {
  if (args.shape.numel() == 0) return cudaSuccess;
  return with_dtype(args.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    return args.input[1].x == nullptr ? choose_apply<S, 1>(args, stream)
                                      : choose_apply<S, 2>(args, stream);
  });
}

}  // namespace braze::cuda
