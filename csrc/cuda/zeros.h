// Device memory that is zero whenever no launch uses it: counters that kernels leave as they found
// them.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

namespace braze::cuda {

// `words` on the current device, for launches that follow each other. By cudaMalloc and never
// freed: a captured graph may outlive whoever asked for them. Nothing can be allocated while a
// stream is captured: then what earlier calls left over has to do, and where that is too little the
// result is cudaErrorStreamCaptureUnsupported.
cudaError_t take_zeros(size_t words, bool capturing, unsigned int** zeros);

}  // namespace braze::cuda
