// Which kernel a pass of batch norm's backward takes. Each pass is a file of its own: they are long
// to compile.
#pragma once
#include "../math/hook.h"
#include "batch_norm_backward.cuh"
#include "batch_norm_launch.h"

namespace braze::cuda {

inline BackwardArgument make_argument(const BackwardArgs& args) {
  BackwardArgument argument = {};
  argument.args = args;
  const Slopes<double> slopes = slopes_of(args.activation, args.parameter);
  argument.upper = slopes.upper;
  argument.lower = slopes.lower;
  argument.recompute =
      BRAZE_HOOK(without_mask, args.mask == nullptr) && args.activation != Activation::identity;
  argument.reads_x =
      BRAZE_HOOK(recomputes, argument.recompute) || BRAZE_HOOK(needs_x, args.batch_statistics);
  return argument;
}

// Pass::kernel<S, kInputs, Mode>() is the kernel, Pass::kReduces which pass it is of. Calls
// f(kernel, argument, launch, bytes of a partial item) for the kernel that these tensors take.
template <class Pass, class F>
cudaError_t choose(const BackwardArgs& args, F&& f) {
  const bool curved = is_curved(args.activation), mask = args.mask != nullptr;
  if (BRAZE_HOOK(curved_and_masked, curved && mask)) return cudaErrorInvalidValue;
  BackwardArgument argument = make_argument(args);
  const void* const none = nullptr;
  const auto written = [&](const void* tensor) { return Pass::kReduces ? none : tensor; };
  const NormTensors tensors = {args.dy,
                               args.dy2,
                               args.input[0].x,
                               args.input[1].x,
                               argument.recompute ? args.residual : none,
                               written(args.grad[0].dx),
                               written(args.grad[1].dx),
                               written(args.grad_residual)};
  const bool two = args.input[1].x != nullptr;
  // What is rare in training, constant statistics and a dx that nobody wants, is not for them.
  const bool all =
      args.batch_statistics && args.grad[0].dx != nullptr && (!two || args.grad[1].dx != nullptr);
  const bool plain = (Pass::kReduces || all) && is_plain(args.shape, mask, tensors);
  return with_dtype(args.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    const auto run = [&]<int kInputs, class Mode>(std::integral_constant<int, kInputs>, Mode) {
      const auto kernel = Pass::template kernel<S, kInputs, Mode>();
      int64_t resident = 0;
      cudaError_t error = resident_blocks(kernel, resident);
      NormLaunch launch;
      const NormDemand demand{kVector<S>, Mode::kPlain, mask, Pass::kReduces, resident};
      if (error == cudaSuccess) error = make_norm_launch(args.shape, demand, tensors, launch);
      if (error != cudaSuccess) return error;
      argument.grid = launch.grid;
      return f(kernel, argument, launch, sizeof(SumsItem<kInputs>));
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    if constexpr (!std::is_same_v<S, double>) {
      const bool relu = args.activation == Activation::relu;
      if (plain && relu && mask) return two ? run(Two{}, PlainMask{}) : run(One{}, PlainMask{});
      if (plain && !two && !mask) {
        if (args.activation == Activation::identity) return run(One{}, PlainIdentity{});
        if (relu && args.residual == nullptr) return run(One{}, PlainRelu{});
      }
    }
    if (two) return curved ? run(Two{}, AnyCurved{}) : run(Two{}, Any{});
    return curved ? run(One{}, AnyCurved{}) : run(One{}, Any{});
  });
}

}  // namespace braze::cuda
