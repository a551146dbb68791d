// What every operation on CUDA devices says when it cannot be launched.
#pragma once
#include <cuda_runtime.h>

#include <string>

namespace braze {

// Raises unless `error` is cudaSuccess: "<owner>: launching <what> on cuda:<device> failed".
void check_launch(cudaError_t error, const std::string& owner, const char* what, int device);

}  // namespace braze
