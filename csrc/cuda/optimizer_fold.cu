#include "optimizer_run.cuh"

namespace braze::cuda {
template cudaError_t StepLauncher::run<Fold, false>(size_t, int64_t, cudaStream_t);
}  // namespace braze::cuda
