#include "../math/hook.h"
#include "batch_norm_backward.cuh"
#include "batch_norm_launch.h"

namespace braze::cuda {
namespace {

BackwardArgument make_argument(const BackwardArgs& args) {
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

// Reduce and apply_grad by their template arguments, and what a launch of them needs.
struct Reduce {
  static constexpr bool kReduces = true;
  template <class S, int kInputs, class Mode>
  static auto kernel() {
    return batch_norm_reduce_kernel<S, kInputs, Mode>;
  }
};
struct ApplyGrad {
  static constexpr bool kReduces = false;
  template <class S, int kInputs, class Mode>
  static auto kernel() {
    return batch_norm_apply_grad_kernel<S, kInputs, Mode>;
  }
};

// Calls f(kernel, argument, launch, bytes of a partial item) for the kernel that these tensors
// take.
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

}  // namespace

cudaError_t batch_norm_scratch(const BackwardArgs& args, NormScratchSize& size) {
  return choose<Reduce>(
      args, [&](auto, const BackwardArgument&, const NormLaunch& launch, size_t item) {
        size.workspace = size_t{launch.blocks} * static_cast<size_t>(launch.grid.width) * item;
        size.tickets = norm_tickets(launch.grid);
        return cudaSuccess;
      });
}

cudaError_t batch_norm_reduce(const BackwardArgs& args, const NormScratch& scratch,
                              cudaStream_t stream) {
  if (args.shape.c == 0) return cudaSuccess;
  return choose<Reduce>(
      args, [&](auto kernel, BackwardArgument& argument, const NormLaunch& launch, size_t) {
        argument.partials = static_cast<double*>(scratch.workspace);
        argument.tickets = scratch.tickets;
        return BRAZE_LAUNCH(kernel, launch.blocks, launch.threads, 0, stream, argument);
      });
}

cudaError_t batch_norm_coefficients(const CoefficientsArgs& args, cudaStream_t stream) {
  const unsigned blocks = channel_blocks(args.shape.c);
  if (blocks == 0) return cudaSuccess;
  return args.shape.dtype == DType::f64 ? BRAZE_LAUNCH(batch_norm_coefficients_kernel<double>,
                                                       blocks, kNormThreads, 0, stream, args)
                                        : BRAZE_LAUNCH(batch_norm_coefficients_kernel<float>,
                                                       blocks, kNormThreads, 0, stream, args);
}

cudaError_t batch_norm_apply_grad(const BackwardArgs& args, cudaStream_t stream) {
  if (args.shape.numel() == 0) return cudaSuccess;
  return choose<ApplyGrad>(
      args, [&](auto kernel, const BackwardArgument& argument, const NormLaunch& launch, size_t) {
        return BRAZE_LAUNCH(kernel, launch.blocks, launch.threads, 0, stream, argument);
      });
}

}  // namespace braze::cuda
