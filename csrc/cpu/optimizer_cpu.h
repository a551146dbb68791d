// CPU optimizer kernels: plain pointers in, no torch. One parallel region per call.
#pragma once
#include <cstdint>
#include <vector>

#include "../plan/chunks.h"
#include "../plan/hyper.h"

namespace braze::cpu {

void adam_step(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
               const std::vector<AdamHyper>& hypers, int threads);
void sgd_step(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
              const std::vector<SgdHyper>& hypers, int threads);
void fold_gradients(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
                    const std::vector<FoldHyper>& hypers, int threads);

}  // namespace braze::cpu
