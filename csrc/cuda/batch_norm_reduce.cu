#include "batch_norm_backward_choice.cuh"

namespace braze::cuda {
namespace {

struct Reduce {
  static constexpr bool kReduces = true;
  template <class S, int kInputs, class Mode>
  static auto kernel() {
    return batch_norm_reduce_kernel<S, kInputs, Mode>;
  }
};

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

}  // namespace braze::cuda
