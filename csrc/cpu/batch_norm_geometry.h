// How the passes of batch normalisation cut an activation up. Functions of the shape alone: neither
// the number of threads nor the instruction set may change the order of additions.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../plan/batch_norm.h"

namespace braze::cpu {

// Columns of a matrix whose channels repeat, so that its sums and constants fit into a stack frame
// and a cache.
constexpr int64_t kMatrixColumns = 1024;

// All passes see a piece of an activation as rows of columns. A column's channel:
//   pixels: the columns are channels, or several pixels side by side    channel = column % channels
//   planes: the columns are the planes of neighbouring channels, rows   channel = column / span
//           are images; or one channel's, of a plane that is cut up
struct Matrix {
  int64_t offset = 0, stride = 0, rows = 0, columns = 0;
  int64_t tail = 0;  // columns of one more row
};

// The summing passes: blocks end before their sums in T lose accuracy, and are merged in double, in
// order within a part, and then parts in order.
struct Geometry {
  ActivationShape shape;
  int64_t fold = 1;               // pixels side by side in a row
  int64_t slab = 1, slabs = 1;    // channels of a matrix; how many there are of such
  int64_t span = 1;               // columns of a channel that are neighbours
  bool one_channel = false;       // planes are cut up
  int64_t block = 0;              // pixels of a block, or images
  int64_t piece = 0, pieces = 1;  // elements of a block's piece of one plane
  int64_t blocks = 0;             // of one slab
  int64_t parts = 1;

  explicit Geometry(const ActivationShape& s);

  // Work that threads share out: unit u is part u / slabs of slab u % slabs.
  BRAZE_INLINE int64_t units() const { return parts * slabs; }
  BRAZE_INLINE int64_t first_block(int64_t part) const { return blocks * part / parts; }
  BRAZE_INLINE int64_t first_channel(int64_t column) const { return column * slab; }
  BRAZE_INLINE int64_t last_channel(int64_t column) const {
    const int64_t last = first_channel(column) + slab;
    return last < shape.c ? last : shape.c;
  }
  // A block is images() matrices, image_stride() elements apart.
  Matrix matrix(int64_t column, int64_t b) const;
  int64_t images(int64_t b) const;
  // Neighbours among the sums of a channel.
  BRAZE_INLINE int64_t column_span() const { return one_channel ? kMatrixColumns : span; }
  BRAZE_INLINE int64_t image_stride() const { return shape.c * shape.spatial; }
  // Values of one channel in a block, and in a part.
  int64_t block_count(int64_t b) const;
  int64_t part_count(int64_t part) const;
  // Doubles between the rows of the parts' array; whole cache lines.
  BRAZE_INLINE int64_t row() const { return (shape.c + 7) / 8 * 8; }
};

// Rows of double parts[parts][kPartRows][row()].
enum PartRow { kPartShift, kPartSum, kPartSquare, kPartRows };
enum GradientPartRow { kPartGrad, kPartInput, kPartInput2 };

size_t parts_bytes(const Geometry& g);

// Pieces for the passes that treat each element by itself: a few rows of pixels; the planes of
// neighbouring channels, in several images; or, where planes are large, neighbouring planes of one
// image, or a piece of one.
struct Tiles {
  ActivationShape shape;
  int64_t fold = 1;          // pixels side by side in a row
  int64_t rows = 0;          // rows of pixels, or images
  int64_t channels = 0;      // planes: of a tile
  int64_t span = 1;          // columns of a channel that are neighbours
  bool one_channel = false;  // a matrix is one plane, or a piece of it
  int64_t piece = 0, pieces = 1;
  int64_t count = 0;

  explicit Tiles(const ActivationShape& s);
  Matrix matrix(int64_t tile) const;
  // Planes: tiles of the same channels are neighbours.
  BRAZE_INLINE int64_t first_channel(int64_t tile) const {
    return tile / (pieces * images()) * channels;
  }
  BRAZE_INLINE int64_t channels_of(int64_t first) const {
    return first + channels < shape.c ? channels : shape.c - first;
  }
  BRAZE_INLINE int64_t images() const { return (shape.n + rows - 1) / rows; }
};

}  // namespace braze::cpu
