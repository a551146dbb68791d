// The steps of plan/batch_norm.h on the CPU, with at most `threads` threads. The bits of the result
// depend neither on their number nor on the instruction set.
#pragma once
#include "../plan/batch_norm.h"

namespace braze::cpu {

// Bytes of scratch memory that statistics(), reduce() and backward() need, aligned to 64.
size_t batch_norm_workspace(const ActivationShape& shape);

void statistics(const StatisticsArgs& args, void* workspace, int threads);
void combine(const CombineArgs& args);
void from_running(const FromRunningArgs& args);
void apply(const ApplyArgs& args, int threads);
void reduce(const BackwardArgs& args, void* workspace, int threads);
void coefficients(const CoefficientsArgs& args);
void apply_grad(const BackwardArgs& args, int threads);
// reduce() and apply_grad(), faster: what both need is not always computed twice.
void backward(const BackwardArgs& args, void* workspace, int threads);

}  // namespace braze::cpu
