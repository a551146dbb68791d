// The steps of plan/batch_norm.h on the CPU, with at most `threads` threads. The bits of the result
// depend neither on their number nor on the instruction set.
#pragma once
#include "../plan/batch_norm.h"
#include "../plan/interface.h"

namespace braze::cpu {

// Bytes of scratch memory that statistics(), reduce() and backward() need, aligned to 64.
BRAZE_API size_t batch_norm_workspace(const ActivationShape& shape);

BRAZE_API void statistics(const StatisticsArgs& args, void* workspace, int threads);
BRAZE_API void combine(const CombineArgs& args);
BRAZE_API void from_running(const FromRunningArgs& args);
BRAZE_API void apply(const ApplyArgs& args, int threads);
BRAZE_API void reduce(const BackwardArgs& args, void* workspace, int threads);
BRAZE_API void coefficients(const CoefficientsArgs& args);
BRAZE_API void apply_grad(const BackwardArgs& args, int threads);
// reduce() and apply_grad(), faster: what both need is not always computed twice.
BRAZE_API void backward(const BackwardArgs& args, void* workspace, int threads);

}  // namespace braze::cpu
