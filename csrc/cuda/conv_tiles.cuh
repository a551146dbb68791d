// Tiles of 16-bit elements in shared memory, and what warps multiply of them.
#pragma once
#include "../math/convert.h"
#include "../math/hook.h"
#include "ptx.cuh"

namespace braze::cuda {

constexpr int kConvThreads = 256, kConvWarps = kConvThreads / 32;
// Elements that one step adds up for each result, and 16-byte chunks of them.
constexpr int kStepDepth = 64, kStepChunks = kStepDepth / 8;

// Chunk `chunk` of row `row` of a tile with kChunks of them a row, which begins at a multiple of
// 128 bytes. The same chunk of eight rows in a row lies in all 32 banks, as eight chunks of one row
// do.
template <int kChunks>
__device__ __forceinline__ uint4* chunk_at(uint4* tile, unsigned row, unsigned chunk) {
  static_assert(kChunks % 8 == 0);
  // One number, so that not each of its terms takes a register.
  return tile + computed_here(row * kChunks + (chunk ^ (row & 7)));
}
// The chunk of the same row whose number has the other values of `bits`, which are below 8.
template <class T>
__device__ __forceinline__ T* flip(T* chunk, unsigned bits) {
  return static_cast<T*>(flip_shared(chunk, bits * sizeof(uint4)));
}

// What a lane takes of one factor of a product for mma, in parts of 16 rows, or columns, of the
// result by 16 of the depth. kDepthRows: the tile's rows are the depth. kSecond: of the second
// factor, two of mma's.
template <int kChunks, bool kDepthRows, bool kSecond>
class Factor {
 public:
  // `side`: the warp's first row, or column, of the result.
  __device__ __forceinline__ Factor(uint4* tile, unsigned side, unsigned lane) {
    constexpr bool kRowsFirst = kDepthRows == kSecond;
    const unsigned row = kRowsFirst ? lane % 16 : lane / 16 * 8 + lane % 8;
    const unsigned chunk = kRowsFirst ? lane / 16 : lane / 8 % 2;
    first_ = kDepthRows ? chunk_at<kChunks>(tile, row, side / 8 + chunk)
                        : chunk_at<kChunks>(tile + side * kChunks, row, chunk);
  }
  // The part `side` rows, or columns, further, of this depth: multiples of 16.
  __device__ __forceinline__ void load(unsigned side, unsigned depth, uint32_t (&part)[4]) const {
    if constexpr (kDepthRows) {
      ldmatrix_x4_trans(flip(first_, side / 8) + depth * kChunks, part);
    } else {
      ldmatrix_x4(flip(first_, depth / 8) + side * kChunks, part);
    }
  }

 private:
  uint4* first_;
};

template <class S>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<S, Bf16>) {
    mma_m16n8k16_bf16(c, a, b);
  } else {
    mma_m16n8k16_f16(c, a, b);
  }
}

// Two neighbours as memory holds them.
template <class S>
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
  S low, high;
  to_storage(first, low);
  to_storage(second, high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
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
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned row = warp / kAcross * 32, column = warp % kAcross * kWidth;
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
    const Place at;
    const Factor<kDepthRowsA ? kRows / 8 : kStepChunks, kDepthRowsA, false> first(tile_a, at.row,
                                                                                  at.lane);
    const Factor<kDepthRowsB ? kColumns / 8 : kStepChunks, kDepthRowsB, true> second(
        tile_b, at.column, at.lane);
#pragma unroll
    for (unsigned depth = 0; depth < kStepDepth; depth += 16) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) first.load(16 * i, depth, a[i]);
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        uint32_t b[4];
        second.load(8 * j, depth, b);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_add<S>(sums[i][j], a[i], {b[0], b[1]});
          multiply_add<S>(sums[i][j + 1], a[i], {b[2], b[3]});
        }
      }
    }
  }

  // Puts the result, rounded, in a tile of kRows rows.
  template <class S>
  __device__ __forceinline__ void store(uint4* tile) const {
    constexpr int kChunks = kColumns / 8;
    const Place at;
    uint32_t* const first = reinterpret_cast<uint32_t*>(chunk_at<kChunks>(
                                tile + at.row * kChunks, at.lane / 4, at.column / 8)) +
                            at.lane % 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          flip(first, j)[(16 * i + 8 * half) * kChunks * 4] =
              pair_of<S>(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
  }

  // f(row, column, two neighbours' sums).
  template <class F>
  __device__ __forceinline__ void for_pairs(F&& f) const {
    const Place at;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          f(static_cast<int>(at.row + at.lane / 4) + 16 * i + 8 * half,
            static_cast<int>(at.column + at.lane % 4 * 2) + 8 * j, sums[i][j][2 * half],
            sums[i][j][2 * half + 1]);
        }
      }
    }
  }
};

}  // namespace braze::cuda
