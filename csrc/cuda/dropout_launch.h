// Launches dropout: plain pointers in, no torch. One launch per call.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "../plan/dropout.h"
#include "../plan/interface.h"

namespace braze::cuda {

// Elements of one block.
constexpr int64_t kDropoutChunk = 8192;

// On the current device. An error means that nothing was launched.
BRAZE_API cudaError_t dropout(const DropoutArgs& args, cudaStream_t stream);

}  // namespace braze::cuda
