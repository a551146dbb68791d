// How a convolution's result is divided among blocks: slabs of channels, and of each the tiles of
// pixels, dealt to the slab's blocks in turn. Plain structs, the same on host and device.
#pragma once
#include <cuda_runtime.h>

#include "../plan/conv.h"
#include "batch_norm_grid.h"

namespace braze::cuda {

constexpr int kTilePixels = 128;

// Where a kernel's tap puts the pixels of one tensor in another: forward, an output's in the input;
// in the gradient of the input, an input's in the output. Chunks are 16 bytes of channels.
struct ConvPixels {
  uint32_t count;           // of the one tensor, all images'
  int32_t h, w;             // its sizes
  int32_t from_h, from_w;   // of the other one, which is read
  int32_t chunks;           // of a pixel there
  int32_t stride, padding;  // stride: 1 or 2
  bool linear;              // each pixel reads the one of the same number
};

// Of the output, which reads the input; transposed: of the input, which reads the output.
ConvPixels conv_pixels(const ConvShape& shape, bool transposed);

// Whether the kernels count the tensors' pixels and 16-byte chunks in 32 bits.
bool conv_fits(const ConvShape& shape);

// `width` channels of `pixels` pixels each, in slabs of `columns`. As a batch norm's grid, of which
// a reduction's end reads the part that is filled in.
NormGrid make_conv_grid(int64_t pixels, int64_t width, int columns, int64_t resident);

// Blocks of kConvThreads threads with this much shared memory that the device runs at once; lets
// the kernel have it.
template <class Kernel>
cudaError_t resident_conv_blocks(Kernel kernel, size_t shared_bytes, int64_t& blocks) {
  const void* const key = reinterpret_cast<const void*>(kernel);
  bool known = false;
  cudaError_t error = known_resident_blocks(key, blocks, known);
  if (error != cudaSuccess || known) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  int each = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kNormThreads, shared_bytes);
  return error != cudaSuccess ? error : learn_resident_blocks(key, each, blocks);
}

}  // namespace braze::cuda
