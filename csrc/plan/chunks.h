// A list of tensors cut into chunks, and the chunks grouped into batches of about equal cost.
#pragma once
#include <cstdint>
#include <vector>

#include "interface.h"
#include "tensor_work.h"

namespace braze {

constexpr int64_t kCpuChunkElements = 16384;
// A strided element costs about this many linear ones.
constexpr int64_t kStridedCost = 8;

struct Chunk {
  int32_t tensor;
  int64_t begin, end;  // elements
};

struct ChunkList {
  std::vector<Chunk> chunks;
  std::vector<int64_t> batches;  // batch b is chunks [batches[b], batches[b + 1])
  int64_t cost = 0;              // in linear elements

  BRAZE_API void build(const std::vector<TensorWork>& tensors);
  int64_t num_batches() const { return static_cast<int64_t>(batches.size()) - 1; }
};

}  // namespace braze
