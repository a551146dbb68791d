#include "optimizer_run.cuh"

namespace braze::cuda {
template cudaError_t StepLauncher::run<Clip, true>(size_t, int64_t, cudaStream_t);
template cudaError_t StepLauncher::run<Clip, false>(size_t, int64_t, cudaStream_t);
}  // namespace braze::cuda
