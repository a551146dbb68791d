// Launches the steps of plan/conv.h: plain pointers in, no torch. All tensors begin at 16-byte
// boundaries. The device of the tensors must be current. An error means that nothing was launched;
// cudaErrorInvalidConfiguration: the tensors are too large.
#pragma once
#include <cuda_runtime.h>

#include "../plan/conv.h"
#include "../plan/interface.h"
#include "batch_norm_launch.h"

namespace braze::cuda {

// What each of them needs besides its tensors, as reductions do.
BRAZE_API cudaError_t conv_scratch(const ConvForwardArgs& args, NormScratchSize& size);
BRAZE_API cudaError_t conv_scratch(const ConvInputGradArgs& args, NormScratchSize& size);
BRAZE_API cudaError_t conv_scratch(const ConvWeightGradArgs& args, NormScratchSize& size);

// One launch each; the gradient of the weight is two.
BRAZE_API cudaError_t conv_forward(const ConvForwardArgs& args, const NormScratch& scratch,
                                   cudaStream_t stream);
BRAZE_API cudaError_t conv_input_grad(const ConvInputGradArgs& args, const NormScratch& scratch,
                                      cudaStream_t stream);
BRAZE_API cudaError_t conv_weight_grad(const ConvWeightGradArgs& args, const NormScratch& scratch,
                                       cudaStream_t stream);

}  // namespace braze::cuda
