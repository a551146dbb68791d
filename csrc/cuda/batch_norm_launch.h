// Launches the steps of plan/batch_norm.h: plain pointers in, no torch. One launch per call, none
// if there is nothing to do. The device of the tensors must be current. An error means that nothing
// was launched.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../plan/batch_norm.h"
#include "../plan/interface.h"

namespace braze::cuda {

// What a reduction needs besides its tensors. Tickets are zero before and after every launch;
// launches that may run at the same time need tickets and workspaces of their own.
struct NormScratch {
  void* workspace = nullptr;  // aligned to 16 bytes
  unsigned int* tickets = nullptr;
};
struct NormScratchSize {
  size_t workspace = 0;  // bytes
  size_t tickets = 0;    // numbers
};

BRAZE_API cudaError_t batch_norm_scratch(const StatisticsArgs& args, NormScratchSize& size);
BRAZE_API cudaError_t batch_norm_scratch(const CombineArgs& args, NormScratchSize& size);
BRAZE_API cudaError_t batch_norm_scratch(const BackwardArgs& args,
                                         NormScratchSize& size);  // of reduce

BRAZE_API cudaError_t batch_norm_statistics(const StatisticsArgs& args, const NormScratch& scratch,
                                            cudaStream_t stream);
BRAZE_API cudaError_t batch_norm_combine(const CombineArgs& args, const NormScratch& scratch,
                                         cudaStream_t stream);
BRAZE_API cudaError_t batch_norm_apply(const ApplyArgs& args, cudaStream_t stream);
BRAZE_API cudaError_t batch_norm_apply(const RunningApplyArgs& args, cudaStream_t stream);
BRAZE_API cudaError_t batch_norm_reduce(const BackwardArgs& args, const NormScratch& scratch,
                                        cudaStream_t stream);
BRAZE_API cudaError_t batch_norm_coefficients(const CoefficientsArgs& args, cudaStream_t stream);
BRAZE_API cudaError_t batch_norm_apply_grad(const BackwardArgs& args, cudaStream_t stream);

}  // namespace braze::cuda
