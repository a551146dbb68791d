#include "optimizer_run.cuh"

namespace braze::cuda {

cudaError_t StepLauncher::run_measure(bool statistics, int64_t blocks, cudaStream_t stream) {
  return BRAZE_LAUNCH((statistics ? measure_kernel<true> : measure_kernel<false>),
                      static_cast<unsigned int>(blocks), kBlockThreads, 0, stream, argument_);
}

}  // namespace braze::cuda
