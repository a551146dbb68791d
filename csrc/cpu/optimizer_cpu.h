// The CPU optimizer kernels: plain pointers in, no torch. One parallel region per call.
#pragma once
#include <vector>

#include "../plan/chunks.h"
#include "../plan/gradient_sums.h"
#include "../plan/hyper.h"
#include "../plan/interface.h"

namespace braze::cpu {

// One update of all tensors. `hypers` are Hyper<Rule>, not made on a device. sums, [chunk]: null,
// or what is to learn of the update.
BRAZE_API void update_tensors(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
                              const Hypers& hypers, int threads, GradientSums* sums = nullptr);

// One pass over the gradients: sums, [chunk], as OptimizerLoops::measure has them. Returns the sum
// of all squares, whose bits depend on the shapes alone.
BRAZE_API double measure_gradients(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
                                   double weight, bool all, int threads,
                                   std::vector<GradientSums>& sums);

}  // namespace braze::cpu
