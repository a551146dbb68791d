// What is no optimizer's step: the same passes over tensors.
#include "optimizer_run.cuh"

namespace braze::cuda {

template cudaError_t StepLauncher::run<Fold, false>(size_t, int64_t, cudaStream_t);
template cudaError_t StepLauncher::run<Clip, true>(size_t, int64_t, cudaStream_t);
template cudaError_t StepLauncher::run<Clip, false>(size_t, int64_t, cudaStream_t);

cudaError_t StepLauncher::run_measure(bool statistics, int64_t blocks, cudaStream_t stream) {
  return BRAZE_LAUNCH((statistics ? measure_kernel<true> : measure_kernel<false>),
                      static_cast<unsigned int>(blocks), kBlockThreads, 0, stream, argument_);
}

}  // namespace braze::cuda
