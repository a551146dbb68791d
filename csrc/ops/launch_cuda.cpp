#include "launch_cuda.h"

namespace braze {

void check_launch(cudaError_t error, const std::string& owner, const char* what, int device) {
  TORCH_CHECK(error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction,
              owner, ": braze's CUDA kernels were not built for the GPU cuda:", device,
              ". `python -m braze info` lists what they were built for; rebuild with ",
              "TORCH_CUDA_ARCH_LIST set to this GPU's compute capability");
  TORCH_CHECK(error == cudaSuccess, owner, ": launching ", what, " on cuda:", device,
              " failed: ", cuda::describe(error));
}

}  // namespace braze
