#include "optimizer_run.cuh"

namespace braze::cuda {
template cudaError_t StepLauncher::run<Sgd, true>(size_t, int64_t, cudaStream_t);
template cudaError_t StepLauncher::run<Sgd, false>(size_t, int64_t, cudaStream_t);
template cudaError_t StepLauncher::run<Lion, true>(size_t, int64_t, cudaStream_t);
template cudaError_t StepLauncher::run<Lion, false>(size_t, int64_t, cudaStream_t);
}  // namespace braze::cuda
