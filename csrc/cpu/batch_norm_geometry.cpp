#include "batch_norm_geometry.h"

#include <numeric>

namespace braze::cpu {
namespace {

constexpr int64_t kBlockRows = 256;                   // rows of a block's matrix
constexpr int64_t kPieceElements = 8192;              // of a block of planes
constexpr int64_t kMinTile = 4096, kMaxTile = 16384;  // elements of an element-wise pass's tile
constexpr int64_t kUnits = 32;                        // enough to keep many threads busy

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Pixels in a row: enough for a loop to be worth its start, and whole vectors where possible.
int64_t pixels_in_row(int64_t c) {
  constexpr int64_t kGoodColumns = 128;
  if (c >= kGoodColumns) return 1;
  const int64_t vectors = round_up(divide_up(kGoodColumns, c), 16 / std::gcd(c, int64_t{16}));
  return vectors * c <= kMatrixColumns ? vectors : divide_up(kGoodColumns, c);
}

}  // namespace

Geometry::Geometry(const ActivationShape& s) : shape(s) {
  if (shape.numel() == 0) {
    parts = 0;
    return;
  }
  if (shape.channels_last) {
    fold = pixels_in_row(shape.c);
    slabs = divide_up(shape.c, kMatrixColumns);
    slab = std::min(shape.c, round_up(divide_up(shape.c, slabs), 16));
    slabs = divide_up(shape.c, slab);
    const int64_t rows = shape.per_channel();
    // Small activations: shorter blocks, or there is nothing to share out.
    const int64_t wanted = divide_up(rows * slabs, kUnits * fold);
    block = fold * std::clamp(round_up(wanted, 8), int64_t{96}, kBlockRows);
    blocks = divide_up(rows, block);
    parts = std::min(blocks, divide_up(kUnits, slabs));
    return;
  }
  pieces = divide_up(shape.spatial, kPieceElements);
  piece = round_up(divide_up(shape.spatial, pieces), 64);
  pieces = divide_up(shape.spatial, piece);
  block = pieces > 1 ? 1 : std::max(kPieceElements / shape.spatial, int64_t{1});
  block = std::min(block, shape.n);
  blocks = divide_up(shape.n, block) * pieces;
  parts = std::min(blocks, divide_up(kUnits, shape.c));
}

Matrix Geometry::matrix(int64_t column, int64_t b) const {
  Matrix m;
  if (shape.channels_last) {
    const int64_t begin = b * block, count = std::min(block, shape.per_channel() - begin);
    const int64_t c = first_channel(column), width = last_channel(column) - c;
    m.offset = begin * shape.c + c;
    m.stride = fold * shape.c;
    m.rows = count / fold;
    m.columns = fold * width;
    m.tail = count % fold * width;
    return m;
  }
  const int64_t image = b / pieces * block, begin = b % pieces * piece;
  m.offset = (image * shape.c + column) * shape.spatial + begin;
  m.stride = shape.c * shape.spatial;
  m.rows = std::min(block, shape.n - image);
  m.columns = std::min(piece, shape.spatial - begin);
  return m;
}

int64_t Geometry::part_count(int64_t part) const {
  const int64_t begin = first_block(part), end = first_block(part + 1);
  if (shape.channels_last) {
    return std::min(end * block, shape.per_channel()) - begin * block;
  }
  int64_t count = 0;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t image = b / pieces * block, offset = b % pieces * piece;
    count += std::min(block, shape.n - image) * std::min(piece, shape.spatial - offset);
  }
  return count;
}

size_t parts_bytes(const Geometry& g) {
  return static_cast<size_t>(std::max(g.parts, int64_t{1}) * kPartRows * g.row()) * sizeof(double);
}

Tiles::Tiles(const ActivationShape& s, bool repeat) : shape(s) {
  if (shape.numel() == 0) return;
  const int64_t elements = std::clamp(shape.numel() / kUnits, kMinTile, kMaxTile);
  if (shape.channels_last) {
    if (repeat) fold = pixels_in_row(shape.c);
    rows = round_up(divide_up(elements, fold * shape.c), 4);
    count = divide_up(shape.per_channel(), fold * rows);
    return;
  }
  pieces = divide_up(shape.spatial, elements);
  piece = round_up(divide_up(shape.spatial, pieces), kMatrixColumns);
  pieces = divide_up(shape.spatial, piece);
  rows = std::clamp(elements / shape.spatial, int64_t{1}, shape.c);
  count = divide_up(shape.c, rows) * shape.n * pieces;
}

Matrix Tiles::matrix(int64_t tile) const {
  Matrix m;
  if (shape.channels_last) {
    const int64_t begin = tile * fold * rows;
    const int64_t pixels = std::min(fold * rows, shape.per_channel() - begin);
    m.offset = begin * shape.c;
    m.stride = m.columns = fold * shape.c;
    m.rows = pixels / fold;
    m.tail = pixels % fold * shape.c;
    return m;
  }
  const int64_t c = first_channel(tile), image = tile / pieces % shape.n;
  const int64_t begin = tile % pieces * piece;
  m.offset = (image * shape.c + c) * shape.spatial + begin;
  m.stride = shape.spatial;
  m.columns = std::min(piece, shape.spatial - begin);
  m.rows = std::min(rows, shape.c - c);
  return m;
}

}  // namespace braze::cpu
