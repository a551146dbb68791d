// The CPU optimizer kernels: plain pointers in, no torch. One parallel region per call.
#pragma once
#include <vector>

#include "../plan/chunks.h"
#include "../plan/hyper.h"

namespace braze::cpu {

// One update of all tensors. `hypers` are Hyper<Rule>, not made on a device.
void update_tensors(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
                    const Hypers& hypers, int threads);

}  // namespace braze::cpu
