#include "chunks.h"

#include <algorithm>

namespace braze {

void ChunkList::build(const std::vector<TensorWork>& tensors) {
  chunks.clear();
  batches.assign(1, 0);
  cost = 0;
  int64_t batch_cost = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorWork& t = tensors[i];
    const int64_t weight = t.linear ? 1 : kStridedCost;
    const int64_t step = kCpuChunkElements / weight;
    for (int64_t begin = 0; begin < t.numel; begin += step) {
      const int64_t end = std::min(begin + step, t.numel);
      chunks.push_back({static_cast<int32_t>(i), begin, end});
      batch_cost += (end - begin) * weight;
      cost += (end - begin) * weight;
      if (batch_cost >= kCpuChunkElements) {
        batches.push_back(static_cast<int64_t>(chunks.size()));
        batch_cost = 0;
      }
    }
  }
  if (batches.back() != static_cast<int64_t>(chunks.size())) {
    batches.push_back(static_cast<int64_t>(chunks.size()));
  }
}

}  // namespace braze
