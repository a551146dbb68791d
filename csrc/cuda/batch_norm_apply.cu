#include "batch_norm_apply.cuh"
#include "batch_norm_launch.h"

namespace braze::cuda {
namespace {

template <class S, int kInputs>
cudaError_t choose_apply_of(const RunningApplyArgs& args, cudaStream_t stream) {
  const NormTensors tensors = {args.input[0].x, args.input[1].x, args.residual, args.y};
  const auto run = [&]<class Mode>(Mode) {
    const auto kernel = batch_norm_apply_kernel<S, kInputs, Mode>;
    int64_t resident = 0;
    cudaError_t error = resident_blocks(kernel, resident);
    NormLaunch launch;
    const NormDemand demand{kApplyLanes<S, Mode>, Mode::kPlain, Mode::kMask, false, resident};
    if (error == cudaSuccess) error = make_norm_launch(args.shape, demand, tensors, launch);
    if (error != cudaSuccess) return error;
    const ApplyArgument argument{args, launch.grid};
    return BRAZE_LAUNCH(kernel, launch.blocks, launch.threads, 0, stream, argument);
  };
  const bool mask = args.mask != nullptr, relu = args.activation == Activation::relu;
  if (mask && !has_two_slopes(args.activation)) return cudaErrorInvalidValue;
  if constexpr (!std::is_same_v<S, double>) {
    if (is_plain(args.shape, mask, tensors)) {
      if (relu) return mask ? run(PlainMask{}) : run(PlainRelu{});
      if constexpr (kInputs == 1) {
        if (args.activation == Activation::identity) return run(PlainIdentity{});
      }
    }
  }
  if (mask) return run(AnyMask{});
  return is_curved(args.activation) ? run(AnyCurved{}) : run(Any{});
}

cudaError_t choose_apply(const RunningApplyArgs& args, cudaStream_t stream) {
  return with_dtype(args.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    return args.input[1].x == nullptr && args.stats[1] == nullptr
               ? choose_apply_of<S, 1>(args, stream)
               : choose_apply_of<S, 2>(args, stream);
  });
}

}  // namespace

cudaError_t batch_norm_apply(const ApplyArgs& args, cudaStream_t stream) {
  if (args.shape.numel() == 0) return cudaSuccess;
  RunningApplyArgs more;
  static_cast<ApplyArgs&>(more) = args;
  return choose_apply(more, stream);
}

// Even without elements there are stats to make.
cudaError_t batch_norm_apply(const RunningApplyArgs& args, cudaStream_t stream) {
  return args.shape.c == 0 ? cudaSuccess : choose_apply(args, stream);
}

}  // namespace braze::cuda
