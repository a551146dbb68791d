#include <algorithm>

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
cudaError_t launch(const DropoutArgument& argument, unsigned int grid, cudaStream_t stream) {
  const bool channels = argument.args.mask.kind != DropoutMask::element;
  const auto kernel = kernel_for<S>(argument.args.step, channels);
  return BRAZE_LAUNCH(kernel, grid, kDropoutThreads, 0, stream, argument);
}

}  // namespace

cudaError_t dropout(const DropoutArgs& args, cudaStream_t stream, DropoutChunks chunks) {
  const int64_t count = (args.numel + kDropoutChunk - 1) / kDropoutChunk;
  // An empty tensor's seed and offset are wanted all the same.
  const int64_t needed = std::max<int64_t>(count, args.used == nullptr ? 0 : 1);
  const int64_t begin = std::max<int64_t>(chunks.begin, 0), end = std::min(chunks.end, needed);
  if (begin >= end) return cudaSuccess;
  const DropoutArgument argument = {args, begin};
  const auto grid = static_cast<unsigned int>(end - begin);
  switch (args.dtype) {
    case DType::f32: return launch<float>(argument, grid, stream);
    case DType::f64: return launch<double>(argument, grid, stream);
    case DType::bf16: return launch<Bf16>(argument, grid, stream);
    default: return launch<F16>(argument, grid, stream);
  }
}

}  // namespace braze::cuda
