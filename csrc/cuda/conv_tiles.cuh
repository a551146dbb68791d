// Tiles of 16-bit elements in shared memory, and what warps multiply of them.
#pragma once
#include "../math/convert.h"
#include "../math/hook.h"
#include "ptx.cuh"

namespace braze::cuda {

constexpr int kConvThreads = 256, kConvWarps = kConvThreads / 32;
// Elements that one step adds up for each result, and 16-byte chunks of them.
constexpr int kStepDepth = 64, kStepChunks = kStepDepth / 8;

// Chunk `chunk` of row `row` of a tile with kChunks of them a row. The same chunk of eight rows in
// a row lies in all 32 banks, as eight chunks of one row do.
template <int kChunks>
__device__ __forceinline__ uint4* chunk_at(uint4* tile, int row, int chunk) {
  static_assert(kChunks % 8 == 0);
  return tile + row * kChunks + (chunk ^ (row & 7));
}

// What a lane takes of a 16x16 part for mma, whose rows begin at a multiple of 8: of a tile whose
// rows are the result's,
template <int kChunks>
__device__ __forceinline__ void load_rows(uint4* tile, int row, int depth_chunk, int lane,
                                          uint32_t (&a)[4]) {
  ldmatrix_x4(chunk_at<kChunks>(tile + row * kChunks, lane % 16, depth_chunk + lane / 16), a);
}
// or whose rows are the depth.
template <int kChunks>
__device__ __forceinline__ void load_rows_of_depth(uint4* tile, int depth, int row_chunk, int lane,
                                                   uint32_t (&a)[4]) {
  ldmatrix_x4_trans(
      chunk_at<kChunks>(tile + depth * kChunks, lane / 16 * 8 + lane % 8, row_chunk + lane / 8 % 2),
      a);
}
// The same of the second factor: 16 columns, as two of mma's, of a tile whose rows are the result's
// columns,
template <int kChunks>
__device__ __forceinline__ void load_columns(uint4* tile, int column, int depth_chunk, int lane,
                                             uint32_t (&b)[2][2]) {
  uint32_t quarters[4];
  ldmatrix_x4(chunk_at<kChunks>(tile + column * kChunks, lane / 16 * 8 + lane % 8,
                                depth_chunk + lane / 8 % 2),
              quarters);
#pragma unroll
  for (int q = 0; q < 4; ++q) b[q / 2][q % 2] = quarters[q];
}
// or whose rows are the depth.
template <int kChunks>
__device__ __forceinline__ void load_columns_of_depth(uint4* tile, int depth, int column_chunk,
                                                      int lane, uint32_t (&b)[2][2]) {
  uint32_t quarters[4];
  ldmatrix_x4_trans(chunk_at<kChunks>(tile + depth * kChunks, lane % 16, column_chunk + lane / 16),
                    quarters);
#pragma unroll
  for (int q = 0; q < 4; ++q) b[q / 2][q % 2] = quarters[q];
}

template <class S>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<S, Bf16>) {
    mma_m16n8k16_bf16(c, a, b);
  } else {
    mma_m16n8k16_f16(c, a, b);
  }
}

// The part of a kRows x kColumns result that a warp has: 32 rows, and a share of the columns.
template <int kRows, int kColumns>
struct WarpTile {
  static constexpr int kAcross = kConvWarps / (kRows / 32);  // warps side by side
  static constexpr int kWidth = kColumns / kAcross;
  static constexpr int kRowTiles = 2, kColumnTiles = kWidth / 8;
  static_assert(kRows % 32 == 0 && kConvWarps % (kRows / 32) == 0 && kWidth % 16 == 0);

  float sums[kRowTiles][kColumnTiles][4];

  struct Place {
    int lane, row, column;
    __device__ __forceinline__ Place() {
      const int thread = computed_here(static_cast<int>(threadIdx.x)), warp = thread / 32;
      lane = thread % 32;
      row = warp / kAcross * 32;
      column = warp % kAcross * kWidth;
    }
  };

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
      }
    }
  }

  // Adds the product of one step. kDepthRows...: the tile's rows are the depth.
  template <class S, bool kDepthRowsA, bool kDepthRowsB>
  __device__ __forceinline__ void add(uint4* tile_a, uint4* tile_b) {
#pragma unroll
    for (int depth = 0; depth < kStepDepth; depth += 16) {
      const Place at;
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if constexpr (kDepthRowsA) {
          load_rows_of_depth<kRows / 8>(tile_a, depth, at.row / 8 + 2 * i, at.lane, a[i]);
        } else {
          load_rows<kStepChunks>(tile_a, at.row + 16 * i, depth / 8, at.lane, a[i]);
        }
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        uint32_t b[2][2];
        if constexpr (kDepthRowsB) {
          load_columns_of_depth<kColumns / 8>(tile_b, depth, at.column / 8 + j, at.lane, b);
        } else {
          load_columns<kStepChunks>(tile_b, at.column + 8 * j, depth / 8, at.lane, b);
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_add<S>(sums[i][j], a[i], b[0]);
          multiply_add<S>(sums[i][j + 1], a[i], b[1]);
        }
      }
    }
  }

  // f(row, of eight from there, column, of eight from there, two neighbours' sums).
  template <class F>
  __device__ __forceinline__ void for_pairs(F&& f) const {
    const Place at;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          f(at.row + 16 * i + 8 * half, at.lane / 4, at.column + 8 * j, at.lane % 4 * 2,
            sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
  }
};

// Two neighbours as memory holds them.
template <class S>
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
  S low, high;
  to_storage(first, low);
  to_storage(second, high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

}  // namespace braze::cuda
