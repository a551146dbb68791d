// How the passes of batch normalisation cut an activation up. Functions of the shape alone: neither
// the number of threads nor the instruction set may change the order of additions.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../plan/batch_norm.h"

namespace braze::cpu {

// Columns of a matrix, so that its accumulators and constants fit into a stack frame and a cache.
constexpr int64_t kMatrixColumns = 1024;

// The summing passes see a block as a matrix:
//   channels last: columns are channels (a slab of them, or several pixels side by side), and are
//                  summed down the rows
//   planes:        rows are planes of one channel, or there is one row, a piece of a plane
// A block ends before its sums in T lose accuracy; blocks are merged in double: in order within a
// part, and then parts in order.
struct Matrix {
  int64_t offset = 0, stride = 0, rows = 0, columns = 0;
  int64_t tail = 0;  // columns of one more row
};

struct Geometry {
  ActivationShape shape;
  int64_t fold = 1;               // channels last: pixels side by side in a row
  int64_t slab = 0, slabs = 1;    // channels last: channels in a slab, slabs
  int64_t block = 0;              // pixels of a block, or images
  int64_t piece = 0, pieces = 1;  // planes: elements of a block's piece of one plane
  int64_t blocks = 0;             // of one slab or channel
  int64_t parts = 1;

  explicit Geometry(const ActivationShape& s);

  // Work that threads share out: unit u is part u / columns() of slab or channel u % columns().
  int64_t columns() const { return shape.channels_last ? slabs : shape.c; }
  int64_t units() const { return parts * columns(); }
  int64_t first_block(int64_t part) const { return blocks * part / parts; }
  int64_t channels() const { return shape.channels_last ? slab : 1; }
  int64_t first_channel(int64_t column) const { return column * channels(); }
  int64_t last_channel(int64_t column) const {
    return std::min(first_channel(column) + channels(), shape.c);
  }
  Matrix matrix(int64_t column, int64_t b) const;
  // Values of one channel in a part.
  int64_t part_count(int64_t part) const;
  // Doubles between the rows of the parts' array; whole cache lines.
  int64_t row() const { return (shape.c + 7) / 8 * 8; }
};

// Rows of double parts[parts][kPartRows][row()].
enum PartRow { kPartShift, kPartSum, kPartSquare, kPartRows };
enum GradientPartRow { kPartGrad, kPartInput, kPartInput2 };

size_t parts_bytes(const Geometry& g);

// Pieces for the passes that treat each element by itself: a few rows of a channels-last matrix, or
// neighbouring planes of one image (a row each), or a piece of a plane.
struct Tiles {
  ActivationShape shape;
  int64_t fold = 1;  // pixels side by side in a row
  int64_t rows = 0;  // matrix rows, or planes, in a tile
  int64_t piece = 0, pieces = 1;
  int64_t count = 0;

  // repeat: rows may be pixels side by side.
  Tiles(const ActivationShape& s, bool repeat);
  Matrix matrix(int64_t tile) const;
  // Planes: tiles of the same channels are neighbours.
  int64_t first_channel(int64_t tile) const { return tile / pieces / shape.n * rows; }
};

}  // namespace braze::cpu
