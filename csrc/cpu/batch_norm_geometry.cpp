#include "batch_norm_geometry.h"

#include <numeric>

namespace braze::cpu {
namespace {

constexpr int64_t kBlockRows = 256;                   // rows of a block's matrix
constexpr int64_t kPieceElements = 8192;              // of a block of planes that are cut up
constexpr int64_t kMinTile = 4096, kMaxTile = 16384;  // elements of an element-wise pass's tile
constexpr int64_t kUnits = 32;                        // enough to keep many threads busy
constexpr int64_t kSmallPlane = 256;    // elements of a plane that is better not cut up
constexpr int64_t kMediumPlane = 2048;  // of one that several images make a good tile of
constexpr int64_t kFewImages = 4;       // with fewer, constants of small planes do not pay

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Of rows whose parts have n columns: how many parts make whole vectors.
int64_t parts_in_vectors(int64_t n) { return 16 / std::gcd(n, int64_t{16}); }

// Pixels in a row: enough for a loop to be worth its start, and whole vectors where possible.
int64_t pixels_in_row(int64_t c) {
  constexpr int64_t kGoodColumns = 128;
  if (c >= kGoodColumns) return 1;
  const int64_t vectors = round_up(divide_up(kGoodColumns, c), parts_in_vectors(c));
  return vectors * c <= kMatrixColumns ? vectors : divide_up(kGoodColumns, c);
}

// Small planes in a row, in whole vectors where possible.
int64_t planes_in_row(const ActivationShape& shape) {
  const int64_t most = kMatrixColumns / shape.spatial, whole = parts_in_vectors(shape.spatial);
  return std::min(shape.c, most < whole ? most : most / whole * whole);
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
  } else if (shape.spatial <= kSmallPlane) {
    span = shape.spatial;
    slab = planes_in_row(shape);
    slabs = divide_up(shape.c, slab);
    block = std::clamp(round_up(divide_up(shape.n * slabs, kUnits), 8), int64_t{16}, kBlockRows);
    blocks = divide_up(shape.n, block);
  } else {
    one_channel = true;
    slabs = shape.c;
    pieces = divide_up(shape.spatial, kPieceElements);
    piece = round_up(divide_up(shape.spatial, pieces), 64);
    pieces = divide_up(shape.spatial, piece);
    block = pieces > 1 ? 1 : std::max(kPieceElements / shape.spatial, int64_t{1});
    block = std::min(block, shape.n);
    blocks = divide_up(shape.n, block) * pieces;
  }
  parts = std::min(blocks, divide_up(kUnits, slabs));
}

Matrix Geometry::matrix(int64_t column, int64_t b) const {
  Matrix m;
  const int64_t c = first_channel(column), width = last_channel(column) - c;
  if (shape.channels_last) {
    const int64_t begin = b * block, count = std::min(block, shape.per_channel() - begin);
    m.offset = begin * shape.c + c;
    m.stride = fold * shape.c;
    m.rows = count / fold;
    m.columns = fold * width;
    m.tail = count % fold * width;
    return m;
  }
  const int64_t image = b / pieces * block, begin = b % pieces * piece;
  m.offset = (image * shape.c + c) * shape.spatial + begin;
  if (one_channel) {
    m.rows = 1;
    m.columns = std::min(piece, shape.spatial - begin);
  } else {
    m.stride = shape.c * shape.spatial;
    m.rows = std::min(block, shape.n - image);
    m.columns = width * shape.spatial;
  }
  return m;
}

int64_t Geometry::images(int64_t b) const {
  return one_channel ? std::min(block, shape.n - b / pieces * block) : 1;
}

int64_t Geometry::block_count(int64_t b) const {
  if (shape.channels_last) return std::min(block, shape.per_channel() - b * block);
  const int64_t images = std::min(block, shape.n - b / pieces * block);
  return images * (one_channel ? std::min(piece, shape.spatial - b % pieces * piece) : span);
}

int64_t Geometry::part_count(int64_t part) const {
  int64_t count = 0;
  for (int64_t b = first_block(part); b < first_block(part + 1); ++b) count += block_count(b);
  return count;
}

size_t parts_bytes(const Geometry& g) {
  return static_cast<size_t>(std::max(g.parts, int64_t{1}) * kPartRows * g.row()) * sizeof(double);
}

Tiles::Tiles(const ActivationShape& s) : shape(s) {
  if (shape.numel() == 0) return;
  const int64_t elements = std::clamp(shape.numel() / kUnits, kMinTile, kMaxTile);
  if (shape.channels_last) {
    fold = pixels_in_row(shape.c);
    rows = round_up(divide_up(elements, fold * shape.c), 4);
    count = divide_up(shape.per_channel(), fold * rows);
    return;
  }
  if (shape.spatial <= kSmallPlane && shape.n >= kFewImages) {
    span = shape.spatial;
    channels = planes_in_row(shape);
    rows = std::clamp(elements / (channels * span), int64_t{1}, shape.n);
  } else if (shape.spatial <= kMediumPlane && shape.n >= kFewImages) {
    one_channel = true;
    channels = pieces = 1;
    piece = shape.spatial;
    rows = std::clamp(elements / shape.spatial, int64_t{1}, shape.n);
  } else {
    one_channel = true;
    pieces = divide_up(shape.spatial, elements);
    piece = round_up(divide_up(shape.spatial, pieces), kMatrixColumns);
    pieces = divide_up(shape.spatial, piece);
    channels = std::clamp(elements / shape.spatial, int64_t{1}, shape.c);
    rows = 1;
  }
  count = divide_up(shape.c, channels) * images() * pieces;
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
  const int64_t c = first_channel(tile), image = tile / pieces % images() * rows;
  const int64_t begin = tile % pieces * piece;
  m.offset = (image * shape.c + c) * shape.spatial + begin;
  m.stride = shape.c * shape.spatial;
  m.rows = std::min(rows, shape.n - image);
  m.columns = one_channel ? std::min(piece, shape.spatial - begin) : channels_of(c) * span;
  return m;
}

}  // namespace braze::cpu
