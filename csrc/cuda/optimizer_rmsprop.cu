#include "optimizer_run.cuh"

namespace braze::cuda {
template cudaError_t StepLauncher::run<Rmsprop, true>(size_t, int64_t, cudaStream_t);
template cudaError_t StepLauncher::run<Rmsprop, false>(size_t, int64_t, cudaStream_t);
}  // namespace braze::cuda
