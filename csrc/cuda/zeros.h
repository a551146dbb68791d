// Device memory that is zero whenever no launch uses it: counters that kernels leave as they found
// them.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

#include "../plan/interface.h"

namespace braze::cuda {

// `words` on the current device, for launches that follow each other. By cudaMalloc and never
// freed: a captured graph may outlive whoever asked for them. May be called while streams are
// captured, and puts nothing into their graphs.
BRAZE_API cudaError_t take_zeros(size_t words, unsigned int** zeros);

}  // namespace braze::cuda
