#include <algorithm>

#include "batch_norm_launch.h"
#include "batch_norm_statistics.cuh"

namespace braze::cuda {
namespace {

// Calls f(kernel, launch) for the kernel that this tensor takes.
template <class F>
cudaError_t choose_statistics(const StatisticsArgs& args, F&& f) {
  return with_dtype(args.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    const auto run = [&]<class Mode>(Mode) {
      const auto kernel = batch_norm_statistics_kernel<S, Mode>;
      int64_t resident = 0;
      cudaError_t error = resident_blocks(kernel, resident);
      NormLaunch launch;
      const NormDemand demand{kVector<S>, Mode::kPlain, false, true, resident};
      if (error == cudaSuccess) error = make_norm_launch(args.shape, demand, {args.x}, launch);
      return error == cudaSuccess ? f(kernel, launch) : error;
    };
    if constexpr (!std::is_same_v<S, double>) {
      if (is_plain(args.shape, false, {args.x})) return run(PlainIdentity{});
    }
    return run(Any{});
  });
}

}  // namespace

cudaError_t batch_norm_scratch(const StatisticsArgs& args, NormScratchSize& size) {
  return choose_statistics(args, [&](auto, const NormLaunch& launch) {
    size.workspace =
        size_t{launch.blocks} * static_cast<size_t>(launch.grid.width) * sizeof(MomentsItem);
    size.tickets = norm_tickets(launch.grid);
    return cudaSuccess;
  });
}

cudaError_t batch_norm_scratch(const CombineArgs&, NormScratchSize& size) {
  size = {0, 1};
  return cudaSuccess;
}

cudaError_t batch_norm_statistics(const StatisticsArgs& args, const NormScratch& scratch,
                                  cudaStream_t stream) {
  return choose_statistics(args, [&](auto kernel, const NormLaunch& launch) {
    const StatisticsArgument argument{
        args, launch.grid, static_cast<MomentsItem*>(scratch.workspace), scratch.tickets};
    return BRAZE_LAUNCH(kernel, launch.blocks, launch.threads, 0, stream, argument);
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

}  // namespace braze::cuda
