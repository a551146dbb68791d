// The gradient of a convolution's weight as a matrix product over pixels: a block has a tile of one
// tap, and a stretch of the pixels. What blocks of the same tile found is added up by a second
// kernel, in their order.
#pragma once
#include "../math/hook.h"
#include "conv_operands.cuh"

namespace braze::cuda {

struct ConvWeightGradArgument {
  ConvInput input;
  ConvOutputGradient grad;
  ConvPixels pixels;  // of the output, which read the input
  int32_t kernel, c, k;
  uint32_t tiles_c;        // of one tap
  uint32_t tiles;          // of the result
  uint32_t steps, splits;  // of kStepDepth pixels; stretches of them
  float* partials;         // [splits][k][kernel][kernel][c]
};

struct ConvSumArgument {
  const float* partials;
  void* result;
  uint32_t splits;
  int64_t size;  // of the result, a multiple of 8
};

template <int kRows>
struct ConvWeightLayout {
  // In chunks: d, x of the output, and the input.
  static constexpr int kTileD = kStepDepth * kRows / 8, kTileX = kStepDepth * 8;
  static constexpr int kStage = 2 * kTileD + kTileX;
  static constexpr size_t kBytes = 2 * kStage * sizeof(uint4);
};

// A block's copies: kStepDepth pixels of kRows channels of the output, and of 64 of the input.
template <class S, int kRows>
class ConvWeightSteps {
  using Layout = ConvWeightLayout<kRows>;
  static constexpr int kChunksD = kRows / 8;
  static constexpr int kRowsD = Layout::kTileD / kConvThreads, kRowsX = 2;

 public:
  __device__ __forceinline__ ConvWeightSteps(const ConvWeightGradArgument& a, int k0, int c0,
                                             int tap, uint32_t step)
      : a_(a), step_(step) {
    tap_y_ = tap / a.kernel;
    tap_x_ = tap - tap_y_ * a.kernel;
    own_d_ = k0 / 8 + static_cast<int>(threadIdx.x % kChunksD);
    own_x_ = c0 / 8 + static_cast<int>(threadIdx.x % 8);
    from_x_ = rows_.distance(a.pixels, tap_y_, tap_x_) + own_x_;
  }

  __device__ __forceinline__ void copy(uint4* stage) {
    copy_rows_d(place_d(stage), a_.grad.d);
    if (a_.grad.coefficients != nullptr) copy_rows_d(place_d(stage) + Layout::kTileD, a_.grad.x);
    rows_.start(a_.pixels, step_ * kStepDepth + threadIdx.x / 8, kConvThreads / 8);
    live_ = own_x_ < a_.pixels.chunks ? rows_.under(a_.pixels, tap_y_, tap_x_) : 0;
#pragma unroll
    for (int i = 0; i < kRowsX; ++i) {
      copy_chunk(place_x(stage) + i * kConvThreads, a_.input.x, rows_.chunk(i) + from_x_,
                 has_row(live_, i));
    }
    cp_async_commit();
  }

  // Of what copy() brought last, once it is there.
  __device__ __forceinline__ void prepare(uint4* stage) const {
    if (a_.grad.coefficients != nullptr && own_d_ < a_.k / 8) {
      uint32_t rows = 0;
#pragma unroll
      for (int i = 0; i < kRowsD; ++i) rows |= (pixel_d(i) < a_.pixels.count ? 1u : 0) << (6 * i);
      differentiate_chunks<S, kRowsD>(a_.grad, a_.k, own_d_ * 8, Layout::kTileD, place_d(stage),
                                      rows);
    }
    if (a_.input.stats != nullptr && own_x_ < a_.pixels.chunks) {
      activate_chunks<S, kRowsX>(a_.input, a_.c, own_x_ * 8, place_x(stage), live_);
    }
  }

  __device__ __forceinline__ uint32_t advance() { return ++step_; }

 private:
  __device__ __forceinline__ uint32_t pixel_d(int i) const {
    return step_ * kStepDepth + threadIdx.x / kChunksD +
           static_cast<uint32_t>(i * (kConvThreads / kChunksD));
  }
  __device__ __forceinline__ void copy_rows_d(uint4* to, const void* tensor) const {
    const int chunks = a_.k / 8;
#pragma unroll
    for (int i = 0; i < kRowsD; ++i) {
      const bool there = BRAZE_HOOK(own_gradients, pixel_d(i) < a_.pixels.count) && own_d_ < chunks;
      copy_chunk(to + i * kConvThreads, tensor, static_cast<int32_t>(pixel_d(i)) * chunks + own_d_,
                 there);
    }
  }
  static __device__ __forceinline__ uint4* place_d(uint4* stage) {
    return chunk_at<kChunksD>(stage, threadIdx.x / kChunksD, threadIdx.x % kChunksD);
  }
  static __device__ __forceinline__ uint4* place_x(uint4* stage) {
    return chunk_at<8>(stage + 2 * Layout::kTileD, threadIdx.x / 8, threadIdx.x % 8);
  }

  const ConvWeightGradArgument& a_;
  PixelRows<kRowsX, false> rows_;
  int tap_y_, tap_x_;
  int own_d_, own_x_;  // chunks of a pixel
  uint32_t step_;
  int32_t from_x_;  // the thread's chunk of a pixel under the first tap
  uint32_t live_;   // of the step: rows of the input that are there
};

template <class S, int kRows>
__global__ void __launch_bounds__(kConvThreads, 2)
    conv_weight_grad_kernel(BRAZE_GRID_CONSTANT(ConvWeightGradArgument) a) {
  using Layout = ConvWeightLayout<kRows>;
  BRAZE_DYNAMIC_SHARED(uint4, shared);
  const uint32_t split = blockIdx.x / a.tiles, tile = blockIdx.x - split * a.tiles;
  const uint32_t of_taps = tile / a.tiles_c;
  const int c0 = static_cast<int>(tile - of_taps * a.tiles_c) * 64;
  const int taps = a.kernel * a.kernel;
  const int tap = static_cast<int>(of_taps) % taps, k0 = static_cast<int>(of_taps) / taps * kRows;
  const auto begin_of = [&](uint32_t s) {
    return static_cast<uint32_t>(uint64_t{a.steps} * s / a.splits);
  };
  const uint32_t end = BRAZE_HOOK(stretch_end, begin_of(split + 1));
  uint32_t step = begin_of(split);
  int now = 0;
  ConvWeightSteps<S, kRows> next(a, k0, c0, tap, step);
  WarpTile<kRows, 64> product;
  product.clear();
  if (step < end) next.copy(shared);
#pragma unroll 1
  while (step < end) {
    uint4* const stage = shared + now * Layout::kStage;
    cp_async_wait<0>();
    next.prepare(stage);
    __syncthreads();  // all of the step is there, and the other stage is free
    step = next.advance();
    now ^= 1;
    if (step < end) next.copy(shared + now * Layout::kStage);
    product.template add<S, true, true>(stage, stage + 2 * Layout::kTileD);
  }
  product.for_pairs([&](int row, int column, float first, float second) {
    const int k = k0 + row, c = c0 + column;
    if (BRAZE_HOOK(own_weights, k < a.k && c < a.c)) {
      const int64_t place = ((int64_t{split} * a.k + k) * taps + tap) * a.c + c;
      *reinterpret_cast<float2*>(a.partials + place) = make_float2(first, second);
    }
  });
}

// Threads that add up parts of the same four numbers.
constexpr int kConvSumParts = 8, kConvSumColumns = kConvThreads / kConvSumParts;

// S: what the result holds.
template <class S>
__global__ void __launch_bounds__(kConvThreads)
    conv_sum_kernel(BRAZE_GRID_CONSTANT(ConvSumArgument) a) {
  BRAZE_SHARED(uint4, parts, kConvThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int part = thread / kConvSumColumns, column = thread % kConvSumColumns;
  const int64_t i = (int64_t{blockIdx.x} * kConvSumColumns + column) * 4;
  float sum[4] = {};
  const auto add = [&](uint4 raw) {
    sum[0] += float_from_bits(raw.x);
    sum[1] += float_from_bits(raw.y);
    sum[2] += float_from_bits(raw.z);
    sum[3] += float_from_bits(raw.w);
  };
  if (i < a.size) {
#pragma unroll 4
    for (uint32_t s = static_cast<uint32_t>(part); s < a.splits; s += kConvSumParts) {
      add(load16(a.partials + int64_t{s} * a.size + i));
    }
  }
  store16_shared(&parts[thread], make_uint4(bits_from_float(sum[0]), bits_from_float(sum[1]),
                                            bits_from_float(sum[2]), bits_from_float(sum[3])));
  __syncthreads();  // all parts are there
  if (part != 0 || i >= a.size) return;
  for (int p = 1; p < BRAZE_HOOK(sum_parts, kConvSumParts); ++p) {
    add(load16(&parts[p * kConvSumColumns + column]));
  }
  if constexpr (std::is_same_v<S, float>) {
    store16(static_cast<float*>(a.result) + i,
            make_uint4(bits_from_float(sum[0]), bits_from_float(sum[1]), bits_from_float(sum[2]),
                       bits_from_float(sum[3])));
  } else {
    *reinterpret_cast<uint2*>(static_cast<S*>(a.result) + i) =
        make_uint2(pair_of<S>(sum[0], sum[1]), pair_of<S>(sum[2], sum[3]));
  }
}

}  // namespace braze::cuda
