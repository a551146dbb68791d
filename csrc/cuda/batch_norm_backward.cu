#include "../math/hook.h"
#include "batch_norm_backward.cuh"
#include "batch_norm_launch.h"

namespace braze::cuda {
namespace {

BackwardArgument make_argument(const BackwardArgs& args, bool reduction) {
  BackwardArgument argument = {};
  argument.args = args;
  const Slopes<double> slopes = slopes_of(args.activation, args.parameter);
  argument.upper = slopes.upper;
  argument.lower = slopes.lower;
  argument.recompute =
      BRAZE_HOOK(without_mask, args.mask == nullptr) && args.activation != Activation::identity;
  argument.reads_x = reduction || BRAZE_HOOK(recomputes, argument.recompute) ||
                     BRAZE_HOOK(needs_x, args.batch_statistics);
  return argument;
}

template <class Kernel>
cudaError_t fill_grid(Kernel kernel, int lanes, bool reduction, BackwardArgument& argument,
                      NormLaunch& launch) {
  int64_t resident = 0;
  if (const cudaError_t error = resident_blocks(kernel, resident); error != cudaSuccess) {
    return error;
  }
  const BackwardArgs& a = argument.args;
  const void* const none = nullptr;
  const cudaError_t error =
      make_norm_launch(a.shape, {lanes, a.mask != nullptr, reduction, resident},
                       {a.dy, a.dy2, a.input[0].x, a.input[1].x,
                        argument.recompute ? a.residual : none, reduction ? none : a.grad[0].dx,
                        reduction ? none : a.grad[1].dx, reduction ? none : a.grad_residual},
                       launch);
  argument.grid = launch.grid;
  return error;
}

// Calls f with the storage type, the number of inputs and whether the activation is curved.
template <class F>
cudaError_t choose(const BackwardArgs& args, F&& f) {
  const bool curved = is_curved(args.activation);
  if (BRAZE_HOOK(curved_and_masked, curved && args.mask != nullptr)) return cudaErrorInvalidValue;
  return with_dtype(args.shape.dtype, [&](auto storage) {
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    if (args.input[1].x == nullptr) {
      return curved ? f(storage, One{}, std::true_type{}) : f(storage, One{}, std::false_type{});
    }
    return curved ? f(storage, Two{}, std::true_type{}) : f(storage, Two{}, std::false_type{});
  });
}

}  // namespace

cudaError_t batch_norm_scratch(const BackwardArgs& args, NormScratchSize& size) {
  return choose(args, [&](auto storage, auto inputs, auto curved) {
    using S = decltype(storage);
    BackwardArgument argument = make_argument(args, true);
    NormLaunch launch;
    const cudaError_t error = fill_grid(batch_norm_reduce_kernel<S, inputs(), curved()>, kVector<S>,
                                        true, argument, launch);
    if (error != cudaSuccess) return error;
    size.workspace =
        size_t{launch.blocks} * static_cast<size_t>(launch.grid.width) * sizeof(SumsItem<inputs()>);
    size.tickets = launch.grid.groups;
    return cudaSuccess;
  });
}

cudaError_t batch_norm_reduce(const BackwardArgs& args, const NormScratch& scratch,
                              cudaStream_t stream) {
  if (args.shape.c == 0) return cudaSuccess;
  return choose(args, [&](auto storage, auto inputs, auto curved) {
    using S = decltype(storage);
    const auto kernel = batch_norm_reduce_kernel<S, inputs(), curved()>;
    BackwardArgument argument = make_argument(args, true);
    NormLaunch launch;
    const cudaError_t error = fill_grid(kernel, kVector<S>, true, argument, launch);
    if (error != cudaSuccess) return error;
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
  return choose(args, [&](auto storage, auto inputs, auto curved) {
    using S = decltype(storage);
    const auto kernel = batch_norm_apply_grad_kernel<S, inputs(), curved()>;
    BackwardArgument argument = make_argument(args, false);
    NormLaunch launch;
    const cudaError_t error = fill_grid(kernel, kVector<S>, false, argument, launch);
    if (error != cudaSuccess) return error;
    return BRAZE_LAUNCH(kernel, launch.blocks, launch.threads, 0, stream, argument);
  });
}

}  // namespace braze::cuda
