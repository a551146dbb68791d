// What tiles of convolutions are filled with: which 16 bytes of a tensor, and what is made of them
// once they are there.
#pragma once
#include <type_traits>

#include "../math/activation.h"
#include "../math/batch_norm.h"
#include "../plan/conv.h"
#include "conv_grid.h"
#include "conv_tiles.cuh"
#include "elements.cuh"

namespace braze::cuda {

// Rows of a tile that are pixels, as the thread that copies them knows them: row i is pixel
// first + i * step. Sets of rows are masks, with bit 6 i for row i. kTransposed: of the gradient of
// the input.
template <int kCount, bool kTransposed>
class PixelRows {
  static_assert(kCount * 6 <= 32);

 public:
  __device__ __forceinline__ void start(const ConvPixels& p, uint32_t first, uint32_t step) {
    there_ = 0;
    if (p.linear) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const uint32_t pixel = first + static_cast<uint32_t>(i) * step;
        if (BRAZE_HOOK(past_linear, pixel < p.count)) there_ |= 1u << (6 * i);
        first_[i] = static_cast<int32_t>(pixel) * p.chunks;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t pixel = first + static_cast<uint32_t>(i) * step;
      if (BRAZE_HOOK(past_pixels, pixel < p.count)) start_row(p, i, pixel);
    }
  }

  // Rows that have a pixel under a tap.
  __device__ __forceinline__ uint32_t under(const ConvPixels& p, int tap_y, int tap_x) const {
    return p.linear ? there_ : there_ >> tap_y & there_ >> (3 + tap_x) & 0x41041u;
  }
  // The first of row i's chunks under the first tap, and how far it is from there to another one's.
  __device__ __forceinline__ int32_t chunk(int i) const { return first_[i]; }
  static __device__ __forceinline__ int32_t distance(const ConvPixels& p, int tap_y, int tap_x) {
    const int shift = kTransposed ? p.stride - 1 : 0;
    const int32_t step = ((tap_y >> shift) * p.from_w + (tap_x >> shift)) * p.chunks;
    return BRAZE_HOOK(turned, kTransposed) ? -step : step;
  }

 private:
  __device__ __forceinline__ void start_row(const ConvPixels& p, int i, uint32_t pixel) {
    const auto w = static_cast<uint32_t>(p.w), plane = static_cast<uint32_t>(p.h) * w;
    const uint32_t image = pixel / plane, place = pixel - image * plane, row = place / w;
    // Under the first tap, before strides are taken out.
    int y = static_cast<int>(row), x = static_cast<int>(place - row * w);
    y = kTransposed ? y + p.padding : y * p.stride - p.padding;
    x = kTransposed ? x + p.padding : x * p.stride - p.padding;
    there_ |= (taps(p, y, p.from_h) | taps(p, x, p.from_w) << 3) << (6 * i);
    const int shift = kTransposed ? p.stride - 1 : 0;
    first_[i] = (static_cast<int32_t>(image) * p.from_h * p.from_w + (y >> shift) * p.from_w +
                 (x >> shift)) *
                p.chunks;
  }

  // Bit by bit, the taps that find a pixel along one axis.
  static __device__ __forceinline__ uint32_t taps(const ConvPixels& p, int at, int size) {
    uint32_t found = 0;
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
      bool there;
      if constexpr (kTransposed) {
        const int from = at - tap;
        there = BRAZE_HOOK(between_strides, (from & (p.stride - 1)) == 0) && from >= 0 &&
                BRAZE_HOOK(last_stride, from < size * p.stride);
      } else {
        there = BRAZE_HOOK(before_first, at + tap >= 0) && BRAZE_HOOK(after_last, at + tap < size);
      }
      found |= static_cast<uint32_t>(there) << tap;
    }
    return found;
  }

  int32_t first_[kCount];
  uint32_t there_;  // six bits a row: the taps along y, and along x; linear: one
};

__device__ __forceinline__ bool has_bit(uint32_t bits, int i) {
  // Else the compiler makes masks of the bits, where a predicate does.
  return computed_here(bits & 1u << i) != 0;
}
__device__ __forceinline__ bool has_row(uint32_t rows, int i) { return has_bit(rows, 6 * i); }

// A chunk of a tensor to a place in shared memory, or zeros.
__device__ __forceinline__ void copy_chunk(uint4* to, const void* tensor, int32_t chunk,
                                           bool there) {
  const auto place = static_cast<uint32_t>(there ? chunk : 0);
  cp_async16_or_zero(to, static_cast<const uint4*>(tensor) + place, there);
}

__device__ __forceinline__ Words words_of(uint4 raw) { return {{raw.x, raw.y, raw.z, raw.w}}; }
__device__ __forceinline__ uint4 raw_of(const Words& w) {
  return make_uint4(w.word[0], w.word[1], w.word[2], w.word[3]);
}

// Eight numbers of consecutive channels, of one row of a table.
__device__ __forceinline__ void load8(float (&values)[8], const void* table, int row, int channels,
                                      int channel) {
  const auto place = static_cast<uint32_t>(row * channels + channel);
  const float* const from = static_cast<const float*>(table) + place;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 raw = load16(from + 4 * half);
    values[4 * half] = float_from_bits(raw.x);
    values[4 * half + 1] = float_from_bits(raw.y);
    values[4 * half + 2] = float_from_bits(raw.z);
    values[4 * half + 3] = float_from_bits(raw.w);
  }
}

// What turns eight channels of x into z.
struct ChunkNormalizer {
  float mean[8], scale[8], shift[8];
  __device__ __forceinline__ ChunkNormalizer(const void* stats, int channels, int channel) {
    load8(mean, stats, kMean, channels, channel);
    load8(scale, stats, kScale, channels, channel);
    load8(shift, stats, kShift, channels, channel);
  }
  __device__ __forceinline__ float operator()(float x, int j) const {
    return normalize(x, mean[j], scale[j], shift[j]);
  }
};

// relu of two numbers, as memory holds them.
template <class S>
__device__ __forceinline__ uint32_t relu_pair_of(float first, float second) {
  if constexpr (std::is_same_v<S, Bf16>) {
    return relu_pair_bf16(first, second);
  } else {
    return relu_pair_f16(first, second);
  }
}

// Of kCount chunks of shared memory of one and the same eight channels, every kConvThreads-th from
// `first`, those of `rows`: makes x the activation of its normalisation.
template <class S, int kCount>
__device__ __forceinline__ void activate_chunks(const ConvInput& input, int channels, int channel,
                                                uint4* first, uint32_t rows) {
  const ChunkNormalizer z(input.stats, channels, channel);
  const auto parameter = static_cast<float>(input.parameter);
  with_activation<is_recomputed>(input.activation, [&](auto constant) {
    constexpr Activation kA = decltype(constant)::value;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      uint4* const at = first + i * kConvThreads;
      Words words = words_of(load16(at));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float first = z(words.get<S>(2 * j), 2 * j);
        const float second = z(words.get<S>(2 * j + 1), 2 * j + 1);
        if constexpr (kA == Activation::relu) {
          words.word[j] = relu_pair_of<S>(first, second);
        } else {
          words.word[j] =
              pair_of<S>(activate<kA>(first, parameter), activate<kA>(second, parameter));
        }
      }
      if (BRAZE_HOOK(padding_stays, has_row(rows, i))) store16_shared(at, raw_of(words));
    }
  });
}

// The same of d, which becomes the gradient before the batch norm; x is `distance` chunks behind.
template <class S, int kCount>
__device__ __forceinline__ void differentiate_chunks(const ConvOutputGradient& grad, int channels,
                                                     int channel, int distance, uint4* first,
                                                     uint32_t rows) {
  float mean[8], on_grad[8], on_input[8], constant[8];
  load8(mean, grad.stats, kMean, channels, channel);
  load8(on_grad, grad.coefficients, kOnGrad, channels, channel);
  load8(on_input, grad.coefficients, kOnInput, channels, channel);
  load8(constant, grad.coefficients, kConstant, channels, channel);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    uint4* const at = first + i * kConvThreads;
    Words d = words_of(load16(at));
    const Words x = words_of(load16(at + distance));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      d.set<S>(j, input_gradient(d.get<S>(j), x.get<S>(j), mean[j], on_grad[j], on_input[j],
                                 constant[j]));
    }
    if (has_row(rows, i)) store16_shared(at, raw_of(d));
  }
}

}  // namespace braze::cuda
