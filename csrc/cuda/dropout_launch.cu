#include <algorithm>

#include "../math/hook.h"
#include "dropout_kernels.cuh"
#include "dropout_launch.h"

namespace braze::cuda {
namespace {

template <class S>
auto kernel_for(DropoutStep step, bool channels) {
  switch (step) {
    case DropoutStep::scale:
      return channels ? dropout_kernel<S, DropoutStep::scale, true>
                      : dropout_kernel<S, DropoutStep::scale, false>;
    case DropoutStep::add: return dropout_kernel<S, DropoutStep::add, false>;
    case DropoutStep::activate: return dropout_kernel<S, DropoutStep::activate, false>;
    default: return dropout_kernel<S, DropoutStep::activate_grad, false>;
  }
}

template <class S>
cudaError_t launch(const DropoutArgs& args, unsigned int grid, cudaStream_t stream) {
  const auto kernel =
      kernel_for<S>(args.step, BRAZE_HOOK(by_channels, args.mask.kind != DropoutMask::element));
  return BRAZE_LAUNCH(kernel, grid, kDropoutThreads, 0, stream, args);
}

}  // namespace

cudaError_t dropout(const DropoutArgs& args, cudaStream_t stream) {
  const int64_t chunks = (args.numel + BRAZE_HOOK(rounding_up, kDropoutChunk - 1)) / kDropoutChunk;
  if (chunks == 0 && BRAZE_HOOK(unused, args.used == nullptr)) return cudaSuccess;
  // An empty tensor's seed and offset are wanted all the same.
  const auto grid = static_cast<unsigned int>(std::max<int64_t>(BRAZE_HOOK(chunks, chunks), 1));
  return with_dtype(args.dtype,
                    [&](auto stored) { return launch<decltype(stored)>(args, grid, stream); });
}

}  // namespace braze::cuda
