// How a batch-norm launch divides its tensors, and what of it threads read. Plain structs, the same
// on host and device.
//
// Memory is rows: pixels of `channels` elements (channels last) or planes of `spatial` ones. A unit
// is kLanes consecutive elements of a row. Blocks come in groups that own channels: one channel of
// planes, or a slab of `words` units of every pixel, so that each thread keeps its channels. The
// units of a group are dealt to its threads in turn, in a way that depends on the shape, the
// alignment and the device alone.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "../math/convert.h"
#include "../plan/batch_norm.h"

namespace braze::cuda {

constexpr int kNormThreads = 256;  // at most
// A thread adds up so many values in the arithmetic type; wider numbers take over from there.
constexpr int kMaxRun = 256;

struct NormGrid {
  int64_t channels, length;           // length: elements of a row
  int64_t rows;                       // of a group: pixels, or images
  int64_t words;                      // units of a row that are the group's
  int64_t stride_rows, stride_words;  // between a thread's units
  int64_t mask_row;                   // bytes of mask per row
  uint32_t groups, splits;            // blocks of a group
  int32_t active;                     // threads of a block that have units
  int32_t width;                      // channels of a group
  int32_t phase;                      // elements from a 16-byte boundary to the tensors
  bool channels_last;
  bool aligned;         // the tensors agree in their phase
  bool moves_to_phase;  // a plane's units begin at 16-byte boundaries, not at its first element
};

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
  bool mask;         // units keep to the bytes of a mask
  bool reduction;    // threads have at most kMaxRun units
  int64_t resident;  // blocks that the device runs at once
};

// The grid for these tensors, all of the shape's dtype; null ones are absent. The shape may be
// empty: then blocks have no units.
cudaError_t make_norm_launch(const ActivationShape& shape, const NormDemand& demand,
                             std::initializer_list<const void*> tensors, NormLaunch& launch);

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
