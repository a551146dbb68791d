// A small tensor-core GEMM that uses every wrapper of ptx.cuh: C = A B, bf16 or fp16, both by rows.
// Compiled by nvcc too.
#pragma once
#include "cuda/ptx.cuh"

namespace gemm {

constexpr int kRows = 64, kColumns = 64, kDepth = 32, kThreads = 128;  // of one block
// Rows of 80 and 144 bytes: eight of them lie in different banks.
constexpr int kStrideA = kDepth + 8, kStrideB = kColumns + 8;

enum class Fault { none, no_wait, no_zeros };
enum class Type { bf16, f16 };

using namespace braze::cuda;

// Zeros beyond depth k, a multiple of 8.
template <Fault kFault>
__device__ void load_tiles(const uint16_t* a, const uint16_t* b, int n, int k, int depth,
                           uint16_t* tile_a, uint16_t* tile_b) {
  const auto copy = [](uint16_t* to, const uint16_t* tensor, int at, bool within) {
    cp_async16_or_zero(to, tensor + (within ? at : 0), within || kFault == Fault::no_zeros);
  };
  const int row0 = static_cast<int>(blockIdx.y) * kRows;
  const int column0 = static_cast<int>(blockIdx.x) * kColumns;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kDepth / 8; i += kThreads) {
    const int row = i / (kDepth / 8), column = i % (kDepth / 8) * 8;
    copy(tile_a + row * kStrideA + column, a, (row0 + row) * k + depth + column,
         depth + column < k);
  }
  for (int i = static_cast<int>(threadIdx.x); i < kDepth * kColumns / 8; i += kThreads) {
    const int row = i / (kColumns / 8), column = i % (kColumns / 8) * 8;
    copy(tile_b + row * kStrideB + column, b, (depth + row) * n + column0 + column,
         depth + row < k);
  }
  cp_async_commit();
}

template <Type kType>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kType == Type::bf16) {
    mma_m16n8k16_bf16(c, a, b);
  } else {
    mma_m16n8k16_f16(c, a, b);
  }
}

template <Type kType>
__device__ uint32_t relu_pair(float first, float second) {
  return kType == Type::bf16 ? relu_pair_bf16(first, second) : relu_pair_f16(first, second);
}

// Each of four warps has 32x32 of the block's 64x64.
template <Type kType>
__device__ void multiply(const uint16_t* tile_a, const uint16_t* tile_b, float (&sums)[2][4][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row0 = warp / 2 * 32, column0 = warp % 2 * 32;
  const int row = lane / 8 % 2 * 8 + lane % 8, column = lane / 16 * 8;
  for (int depth = 0; depth < kDepth; depth += 16) {
    uint32_t a[2][4], b[4][2];
    for (int i = 0; i < 2; ++i) {
      ldmatrix_x4(tile_a + (row0 + 16 * i + row) * kStrideA + depth + column, a[i]);
      uint32_t pair[4];
      ldmatrix_x4_trans(tile_b + (depth + row) * kStrideB + column0 + 16 * i + column, pair);
      for (int k = 0; k < 4; ++k) b[2 * i + k / 2][k % 2] = pair[k];
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) mma<kType>(sums[i][j], a[i], b[j]);
    }
  }
}

// Two tiles of each operand: one is multiplied while the next is on its way.
template <Type kType, Fault kFault>
__global__ void __launch_bounds__(kThreads)
    gemm_kernel(const uint16_t* a, const uint16_t* b, float* c, int n, int k) {
  BRAZE_SHARED(uint4, tiles_a, 2 * kRows * kStrideA / 8);
  BRAZE_SHARED(uint4, tiles_b, 2 * kDepth * kStrideB / 8);
  uint16_t* const tile_a[2] = {reinterpret_cast<uint16_t*>(tiles_a),
                               reinterpret_cast<uint16_t*>(tiles_a) + kRows * kStrideA};
  uint16_t* const tile_b[2] = {reinterpret_cast<uint16_t*>(tiles_b),
                               reinterpret_cast<uint16_t*>(tiles_b) + kDepth * kStrideB};
  float sums[2][4][4] = {};
  load_tiles<kFault>(a, b, n, k, 0, tile_a[0], tile_b[0]);
  for (int depth = 0, now = 0; depth < k; depth += kDepth, now ^= 1) {
    if (depth + kDepth < k) {
      load_tiles<kFault>(a, b, n, k, depth + kDepth, tile_a[now ^ 1], tile_b[now ^ 1]);
      if (kFault != Fault::no_wait) cp_async_wait<1>();
    } else if (kFault != Fault::no_wait) {
      cp_async_wait<0>();
    }
    __syncthreads();  // all threads' copies are there
    multiply<kType>(tile_a[now], tile_b[now], sums);
    __syncthreads();  // all warps are through with the tiles that the next copies overwrite
  }
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int row =
            static_cast<int>(blockIdx.y) * kRows + warp / 2 * 32 + 16 * i + lane / 4 + e / 2 * 8;
        const int column =
            static_cast<int>(blockIdx.x) * kColumns + warp % 2 * 32 + 8 * j + lane % 4 * 2 + e % 2;
        c[row * n + column] = sums[i][j][e];
      }
    }
  }
}

// The raw bits that each instruction gives one warp: what a GPU is compared by. `in`: 512 numbers,
// aligned to 16 bytes, of which zeros take the place of rows 5, 21, 37 and 53 of 8; out: 32 lanes x
// kPatternWords.
constexpr int kPatternWords = 14;
template <Type kType>
__global__ void __launch_bounds__(32) pattern_kernel(const uint16_t* in, uint32_t* out) {
  BRAZE_SHARED(uint4, matrices, 64);
  const int lane = static_cast<int>(threadIdx.x);
  cp_async16(&matrices[2 * lane], in + 2 * lane * 8);
  cp_async16_or_zero(&matrices[2 * lane + 1], in + (2 * lane + 1) * 8, lane % 8 != 2);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t a[4], b[4];
  ldmatrix_x4(&matrices[lane], a);
  ldmatrix_x4_trans(&matrices[32 + lane], b);
  const uint32_t right[2] = {b[0], b[1]};
  float c[4] = {1, 2, 3, 4};
  mma<kType>(c, a, right);
  BRAZE_SHARED(uint4, kept, 32);
  store16_shared(&kept[lane],
                 uint4{relu_pair<kType>(c[0], c[1]), relu_pair<kType>(c[2], c[3]), 0, 0});
  const uint4 pairs = load16(&kept[lane]);
  out[lane * kPatternWords + 12] = pairs.x;
  out[lane * kPatternWords + 13] = pairs.y;
  for (int i = 0; i < 4; ++i) {
    out[lane * kPatternWords + i] = a[i];
    out[lane * kPatternWords + 4 + i] = b[i];
    memcpy(&out[lane * kPatternWords + 8 + i], &c[i], sizeof(float));
  }
}

}  // namespace gemm
