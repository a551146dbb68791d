// How a batch-norm launch divides its tensors, and what of it threads read. Plain structs, the same
// on host and device.
//
// Memory is rows: pixels of `channels` elements (channels last), planes of `spatial` ones, or whole
// images of small planes. A unit is kLanes consecutive elements of a row. Blocks come in groups
// that own channels: one channel of planes, or a slab of `words` units of every pixel or image, so
// that each lane of a thread keeps its channel. The units of a group are dealt to its threads in
// turn, in a way that depends on the shape, the alignment and the device alone.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "../math/convert.h"
#include "../math/qualifiers.h"
#include "../plan/batch_norm.h"

namespace braze::cuda {

constexpr int kNormThreads = 256;  // at most
// A thread adds up so many values in the arithmetic type; wider numbers take over from there.
constexpr int kMaxRun = 256;

struct NormGrid {
  int64_t channels, length;  // length: elements of a row
  int64_t rows;              // of a group: pixels, or images
  int32_t words;             // units of a row that are the group's
  // Between a thread's units: words, rows, and elements from the beginning of the one row's part to
  // that of the other's; and what is added to the latter where the words pass the row's end.
  int32_t stride_words;
  int64_t stride_rows, stride_base, next_row, next_base;
  int64_t mask_row;         // bytes of mask per row
  uint32_t groups, splits;  // blocks of a group
  int32_t active;           // threads of a block that have units
  int32_t width;            // channels of a group
  int32_t share;        // neighbours in a row that are of one channel, where lanes have their own
  int32_t phase;        // elements from a 16-byte boundary to the tensors
  bool per_lane;        // lanes have channels of their own, not blocks
  bool aligned;         // the tensors agree in their phase
  bool moves_to_phase;  // a plane's units begin at 16-byte boundaries, not at its first element
};

// A group of more blocks than kOneLevel merges those of kFan blocks first, then what came of them:
// a single block would read for microseconds.
constexpr uint32_t kFan = 16, kOneLevel = 32;
BRAZE_INLINE uint32_t norm_parts(uint32_t splits) { return (splits - 1) / kFan + 1; }
// Counters that a reduction needs, all zero: the groups', their parts', and one more.
BRAZE_INLINE size_t norm_tickets(const NormGrid& grid) {
  return size_t{grid.groups} * (1 + norm_parts(grid.splits)) + 1;
}

// For one thread per channel.
inline unsigned channel_blocks(int64_t channels) {
  return static_cast<unsigned>((channels + kNormThreads - 1) / kNormThreads);
}

struct NormLaunch {
  NormGrid grid;
  unsigned blocks, threads;
};

// What a kernel asks of its grid.
struct NormDemand {
  int lanes;         // of a unit
  bool plain;        // is_plain() holds
  bool mask;         // units keep to the bytes of a mask
  bool reduction;    // threads have at most kMaxRun units
  int64_t resident;  // blocks that the device runs at once
};

using NormTensors = std::initializer_list<const void*>;  // null: absent

// Whether these tensors, all of the shape's dtype, are whole 16-byte units at 16-byte boundaries in
// rows of a kind that the grid has: then the Plain kernels take them.
bool is_plain(const ActivationShape& shape, bool mask, NormTensors tensors);

// The grid for these tensors, all of the shape's dtype; null ones are absent. The shape may be
// empty: then blocks have no units.
cudaError_t make_norm_launch(const ActivationShape& shape, const NormDemand& demand,
                             NormTensors tensors, NormLaunch& launch);

// Blocks of kNormThreads threads that the current device runs at once; asked once per kernel.
cudaError_t known_resident_blocks(const void* kernel, int64_t& blocks, bool& known);
cudaError_t learn_resident_blocks(const void* kernel, int blocks_per_multiprocessor,
                                  int64_t& blocks);

template <class Kernel>
cudaError_t resident_blocks(Kernel kernel, int64_t& blocks) {
  const void* const key = reinterpret_cast<const void*>(kernel);
  bool known = false;
  cudaError_t error = known_resident_blocks(key, blocks, known);
  if (error != cudaSuccess || known) return error;
  int each = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kNormThreads, 0);
  return error != cudaSuccess ? error : learn_resident_blocks(key, each, blocks);
}

}  // namespace braze::cuda
