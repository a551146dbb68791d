// A convolution as a matrix product whose rows are pixels and whose columns are channels of the
// result, in steps of 64 channels of one tap: the next step's tiles are on their way while this
// one's are multiplied. Each thread makes of the chunks that it copied what they are to be, tiles
// are stored by way of shared memory, and each thread sums the eight channels that it stores.
#pragma once
#include "../math/hook.h"
#include "batch_norm_backward.cuh"
#include "batch_norm_statistics.cuh"
#include "conv_grid.h"
#include "conv_operands.cuh"

namespace braze::cuda {

struct ConvArgument {
  ConvInput input;          // forward: what is read; else the batch norm before
  ConvOutputGradient grad;  // not forward: what is read
  ConvPixels pixels;
  NormGrid grid;
  const void* weight;
  void* result;
  int32_t kernel;
  int32_t depth, width;  // channels that are summed, and those of the result
  int32_t weight_row;    // chunks between rows of the weight
  void* partials;        // items [groups][splits][width of a slab]
  unsigned int* tickets;
};
struct ConvForwardArgument : ConvArgument {
  StatisticsArgs statistics;
};
struct ConvInputGradArgument : ConvArgument {
  BackwardArgs norm;
};

template <int kColumns, bool kForward>
struct ConvLayout {
  // In chunks. x and d have a tile each where they may have to be read both.
  static constexpr int kTileA = kTilePixels * kStepChunks, kTileB = kColumns * kStepChunks;
  static constexpr bool kTwoTiles = !kForward && kColumns == 64;
  static constexpr int kStage = kTileA * (kTwoTiles ? 2 : 1) + kTileB;
  // Numbers that a thread keeps of its eight channels: shift, sum, square, or two sums.
  static constexpr int kNumbers = kForward ? 3 : 2;
  static constexpr int kKept = 2 * kNumbers * kConvThreads;
  static constexpr size_t kBytes = (2 * kStage + kKept) * sizeof(uint4);
  // The result's tile takes the place of a step's.
  static constexpr int kChunks = kColumns / 8, kRowStep = kConvThreads / kChunks;
  // Chunks that a thread has in registers at once, and how often that many.
  static constexpr int kStores = 4;
  static constexpr int kParts = kTilePixels / kRowStep / kStores;
  static_assert(kTilePixels * kChunks <= kStage);
  static_assert(kMergeNumbers<MomentsItem> * sizeof(double) <= 2 * kStage * sizeof(uint4));
};

// The chunks that a thread copies, step by step through the block's tiles.
template <class S, int kColumns, bool kForward>
class ConvSteps {
  using Layout = ConvLayout<kColumns, kForward>;
  static constexpr int kRowsA = kTilePixels / 32, kRowsB = Layout::kTileB / kConvThreads;

 public:
  __device__ __forceinline__ ConvSteps(const ConvArgument& a) : a_(a) { start(blockIdx.x); }

  __device__ __forceinline__ void copy(uint4* stage) const {
    uint4* const to = place(stage);
    copy_rows(to, kForward ? a_.input.x : a_.grad.d);
    if constexpr (Layout::kTwoTiles) {
      if (a_.grad.coefficients != nullptr) copy_rows(to + Layout::kTileA, a_.grad.x);
    }
    constexpr int kTile = Layout::kStage - Layout::kTileB;
    uint4* const to_weight = (kChunksB == kStepChunks ? to : place<kChunksB>(stage)) + kTile;
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const bool there = kForward ? has_bit(live_, kWeightBits + i) : i * kStepB < left_;
      copy_chunk(to_weight + i * kConvThreads, a_.weight, weight_ + i * kStepB * a_.weight_row,
                 there);
    }
    cp_async_commit();
  }

  // Of what copy() brought last, once it is there.
  __device__ __forceinline__ void prepare(uint4* stage) const {
    if ((live_ & kPrologue) == 0) return;
    if constexpr (kForward) {
      activate_chunks<S, kRowsA>(a_.input, a_.depth, own_chunk() * 8, place(stage), live_);
    } else if constexpr (Layout::kTwoTiles) {
      differentiate_chunks<S, kRowsA>(a_.grad, a_.depth, own_chunk() * 8, Layout::kTileA,
                                      place(stage), live_);
    }
  }

  // To the next step; true: it is the first of tile `next`, which there may not be.
  __device__ __forceinline__ bool advance(uint32_t next) {
    at_ += kStepChunks << 4;
    if (depth_chunk() < a_.pixels.chunks) {
      from_ += kStepChunks;
      if (own_chunk() >= a_.pixels.chunks) live_ = 0;
      weight_ += kForward ? kStepChunks : kStepDepth * a_.weight_row;
      left_ -= kStepDepth;
      return false;
    }
    at_ = (at_ & 15) + 1;
    if (tap_x() == a_.kernel) at_ = (at_ & 12) + 4;
    const bool last = tap_y() == a_.kernel;
    if (last) {
      start(next);
    } else {
      start_tap();
    }
    return last;
  }

 private:
  // Rows of the weight are channels of the result, or channels that are summed.
  static constexpr int kChunksB = kForward ? kStepChunks : Layout::kChunks;
  static constexpr int kStepB = kConvThreads / kChunksB;
  // Bits of live_: the first one of the weight's rows; whether there is something to prepare.
  static constexpr int kWeightBits = 24;
  static constexpr uint32_t kPrologue = 1u << 31;
  static_assert(kRowsA <= 4 && kRowsB <= 4);

  __device__ __forceinline__ void copy_rows(uint4* to, const void* tensor) const {
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      copy_chunk(to + i * kConvThreads, tensor, rows_.chunk(i) + from_, has_row(live_, i));
    }
  }
  static __device__ __forceinline__ int own_lane() {
    return static_cast<int>(threadIdx.x % kStepChunks);
  }
  __device__ __forceinline__ int tap_x() const { return at_ & 3; }
  __device__ __forceinline__ int tap_y() const { return at_ >> 2 & 3; }
  __device__ __forceinline__ int depth_chunk() const { return at_ >> 4; }
  __device__ __forceinline__ int own_chunk() const { return depth_chunk() + own_lane(); }
  template <int kChunks = kStepChunks>
  static __device__ __forceinline__ uint4* place(uint4* stage) {
    return chunk_at<kChunks>(stage, threadIdx.x / kChunks, threadIdx.x % kChunks);
  }

  __device__ __forceinline__ void start(uint32_t tile) {
    at_ = 0;
    rows_.start(a_.pixels, tile * kTilePixels + threadIdx.x / static_cast<unsigned>(kStepChunks),
                kConvThreads / kStepChunks);
    start_tap();
  }
  // The first step of a tap.
  __device__ __forceinline__ void start_tap() {
    const int tap = tap_y() * a_.kernel + tap_x();
    const int row = static_cast<int>(threadIdx.x / kChunksB);
    const int column = static_cast<int>(threadIdx.x % kChunksB);
    const int first_column = static_cast<int>(blockIdx.y) * kColumns;
    from_ = rows_.distance(a_.pixels, tap_y(), tap_x()) + own_lane();
    live_ = 0;
    const bool in_depth = own_lane() < a_.pixels.chunks;
    if (in_depth) {
      live_ = rows_.under(a_.pixels, tap_y(), tap_x());
      if ((kForward ? a_.input.stats : a_.grad.coefficients) != nullptr) live_ |= kPrologue;
    }
    if constexpr (kForward) {
      const int channel = first_column + row;
      weight_ = channel * a_.weight_row + tap * a_.pixels.chunks + own_lane();
#pragma unroll
      for (int i = 0; i < kRowsB; ++i) {
        const bool there = BRAZE_HOOK(own_columns, channel + i * kStepB < a_.width);
        if (in_depth && there) live_ |= 1u << (kWeightBits + i);
      }
    } else {
      const int chunks = a_.width / 8, chunk = first_column / 8 + column;
      weight_ = row * a_.weight_row + tap * chunks + chunk;
      left_ = BRAZE_HOOK(own_columns, chunk < chunks) ? a_.depth - row : 0;
    }
  }

  const ConvArgument& a_;
  PixelRows<kRowsA, !kForward> rows_;
  int at_;  // depth_chunk << 4 | tap_y << 2 | tap_x
  // Of this step: its distance from rows_'s chunks; what is there; the first chunk of the weight;
  // not forward: rows of the weight from there on.
  int32_t from_;
  uint32_t live_;
  int32_t weight_, left_ = 0;
};

// Eight numbers that a thread keeps in shared memory from tile to tile.
__device__ __forceinline__ uint4* kept_at(uint4* kept, int number, int half) {
  return kept + (2 * number + half) * kConvThreads + threadIdx.x;
}
__device__ __forceinline__ void keep8(uint4* kept, int number, const float (&values)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    store16_shared(
        kept_at(kept, number, half),
        make_uint4(bits_from_float(values[4 * half]), bits_from_float(values[4 * half + 1]),
                   bits_from_float(values[4 * half + 2]), bits_from_float(values[4 * half + 3])));
  }
}
__device__ __forceinline__ void kept8(float (&values)[8], uint4* kept, int number) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 raw = load16(kept_at(kept, number, half));
    values[4 * half] = float_from_bits(raw.x);
    values[4 * half + 1] = float_from_bits(raw.y);
    values[4 * half + 2] = float_from_bits(raw.z);
    values[4 * half + 3] = float_from_bits(raw.w);
  }
}

// Some of a thread's chunks of a tile of the result: of eight channels, and every kRowStep-th row.
template <int kColumns, bool kForward>
struct ConvStores {
  using Layout = ConvLayout<kColumns, kForward>;
  uint32_t pixel, end;   // the first's, and that from which on there are none
  uint32_t first, step;  // chunks of the result
  Words words[Layout::kStores];

  __device__ __forceinline__ ConvStores(const ConvArgument& a, uint32_t tile, int column, int part,
                                        uint4* from) {
    const unsigned own = threadIdx.x % Layout::kChunks;
    const unsigned row = threadIdx.x / Layout::kChunks +
                         static_cast<unsigned>(part * Layout::kStores * Layout::kRowStep);
    const unsigned own_column = static_cast<unsigned>(column) / 8 + own;
    const unsigned chunks = static_cast<unsigned>(a.width) / 8;
    pixel = tile * kTilePixels + row;
    end = BRAZE_HOOK(own_channels, own_column < chunks) ? a.pixels.count : 0;
    first = pixel * chunks + own_column;
    step = Layout::kRowStep * chunks;
#pragma unroll
    for (int i = 0; i < Layout::kStores; ++i) {
      words[i] = words_of(load16(chunk_at<Layout::kChunks>(from, row, own) + i * kConvThreads));
    }
  }
  __device__ __forceinline__ bool there(int i) const {
    return BRAZE_HOOK(own_rows, pixel + static_cast<unsigned>(i * Layout::kRowStep) < end);
  }
  __device__ __forceinline__ uint32_t chunk(int i) const {
    return first + static_cast<unsigned>(i) * step;
  }
  __device__ __forceinline__ void store(void* result) const {
#pragma unroll
    for (int i = 0; i < Layout::kStores; ++i) {
      if (there(i)) store16(static_cast<uint4*>(result) + chunk(i), raw_of(words[i]));
    }
  }
};

// Stores them and adds their values to the thread's moments.
template <class S, int kColumns>
__device__ __forceinline__ void finish_part(const ConvForwardArgument& a,
                                            const ConvStores<kColumns, true>& tile, int,
                                            uint4* kept, bool first) {
  constexpr int kStores = ConvLayout<kColumns, true>::kStores;
  tile.store(a.result);
  float shift[8], sum[8] = {}, square[8] = {};
  if (first) {
    // The mean of the thread's first values: near enough, whatever the others are.
    int values = 0;
#pragma unroll
    for (int i = 0; i < kStores; ++i) values += tile.there(i);
    const float part = 1 / static_cast<float>(values);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      shift[j] = 0;
#pragma unroll
      for (int i = 0; i < kStores; ++i) {
        if (tile.there(i)) shift[j] += tile.words[i].template get<S>(j);
      }
      shift[j] = make_shift(shift[j] * part, 1.0f);
    }
    keep8(kept, 0, shift);
  } else {
    kept8(shift, kept, 0);
    kept8(sum, kept, 1);
    kept8(square, kept, 2);
  }
#pragma unroll
  for (int i = 0; i < kStores; ++i) {
    if (BRAZE_HOOK(uncounted_row, !tile.there(i))) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      add_moment(tile.words[i].template get<S>(j), shift[j], sum[j], square[j]);
    }
  }
  keep8(kept, 1, sum);
  keep8(kept, 2, square);
}

// The same of a gradient, which the batch norm before takes through its activation.
template <class S, int kColumns>
__device__ __forceinline__ void finish_part(const ConvInputGradArgument& a,
                                            ConvStores<kColumns, false>& tile, int channel,
                                            uint4* kept, bool first) {
  constexpr int kStores = ConvLayout<kColumns, false>::kStores;
  if (a.input.stats != nullptr && BRAZE_HOOK(has_channel, channel < a.width)) {
    Words x[kStores] = {};
#pragma unroll
    for (int i = 0; i < kStores; ++i) {
      if (tile.there(i)) {
        x[i] = words_of(load16(static_cast<const uint4*>(a.input.x) + tile.chunk(i)));
      }
    }
    const ChunkNormalizer z(a.input.stats, a.width, channel);
    const auto parameter = static_cast<float>(a.input.parameter);
    float grad[8] = {}, grad_input[8] = {};
    if (!first) {
      kept8(grad, kept, 0);
      kept8(grad_input, kept, 1);
    }
    with_activation<is_recomputed>(a.input.activation, [&](auto activation) {
      constexpr Activation kA = decltype(activation)::value;
#pragma unroll
      for (int i = 0; i < kStores; ++i) {
        if (!tile.there(i)) continue;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float v = x[i].template get<S>(j);
          float d = activation_gradient<kA>(tile.words[i].template get<S>(j), z(v, j), parameter);
          tile.words[i].template set<S>(j, d);
          // As stored; what is d or 0 has been rounded before.
          if constexpr (kA != Activation::relu) d = tile.words[i].template get<S>(j);
          add_gradient(d, v, z.mean[j], grad[j], grad_input[j]);
        }
      }
    });
    keep8(kept, 0, grad);
    keep8(kept, 1, grad_input);
  }
  tile.store(a.result);
}

__device__ __forceinline__ float kept_number(uint4* kept, int number, int lane) {
  return reinterpret_cast<const float*>(kept_at(kept, number, lane / 4))[lane % 4];
}

// Values of each channel that the thread has summed.
template <class Layout>
__device__ __forceinline__ int kept_values(const ConvArgument& a) {
  const uint32_t first = blockIdx.x, whole = a.pixels.count / kTilePixels;
  const int row = static_cast<int>(threadIdx.x) / Layout::kChunks;
  const int rest = static_cast<int>(a.pixels.count % kTilePixels) - row;  // of a tile in part
  const uint32_t tiles = first < whole ? (whole - 1 - first) / a.grid.splits + 1 : 0;
  const bool in_part = whole % a.grid.splits == first && rest > 0;
  return static_cast<int>(tiles) * (kTilePixels / Layout::kRowStep) +
         BRAZE_HOOK(values_in_part, in_part ? (rest - 1) / Layout::kRowStep + 1 : 0);
}

template <class Layout>
__device__ __forceinline__ void finish_sums(const ConvForwardArgument& a, uint4* kept,
                                            double* shared) {
  const int count = kept_values<Layout>(a);
  const auto item_of = [&](int lane) {
    MomentsItem item = {};
    if (count != 0) {
      item.set({kept_number(kept, 0, lane), static_cast<double>(count), kept_number(kept, 1, lane),
                kept_number(kept, 2, lane)});
    }
    return item;
  };
  const auto finish = [&](int64_t c, const MomentsItem& item) {
    finish_channel<float>(a.statistics.stats, a.width, c, channel_moments(item.moments()),
                          a.statistics.channels);
  };
  if (reduce_group<MomentsItem, 8>(a.grid, blockIdx.y, blockIdx.x,
                                   static_cast<MomentsItem*>(a.partials), a.tickets, shared,
                                   item_of, finish)) {
    count_batch(a.statistics.channels.batches_tracked, a.tickets + norm_tickets(a.grid) - 1,
                a.grid.groups);
  }
}

template <class Layout>
__device__ __forceinline__ void finish_sums(const ConvInputGradArgument& a, uint4* kept,
                                            double* shared) {
  if (a.input.stats == nullptr) return;
  using Item = SumsItem<1>;
  const int channel = (static_cast<int>(blockIdx.y) * Layout::kChunks +
                       static_cast<int>(threadIdx.x) % Layout::kChunks) *
                      8;
  const bool some = channel < a.width && kept_values<Layout>(a) != 0;
  const auto item_of = [&](int lane) {
    Item item = {};
    if (some) {
      item.number[0] = kept_number(kept, 0, lane);
      item.number[1] = kept_number(kept, 1, lane);
    }
    return item;
  };
  const auto finish = [&](int64_t c, const Item& item) {
    finish_input<float>(a.norm, 0, c, item.number[0], item.number[1]);
  };
  reduce_group<Item, 8>(a.grid, blockIdx.y, blockIdx.x, static_cast<Item*>(a.partials), a.tickets,
                        shared, item_of, finish);
}

template <bool kForward>
using ConvArgumentOf = std::conditional_t<kForward, ConvForwardArgument, ConvInputGradArgument>;

template <class S, int kColumns, bool kForward>
__global__ void __launch_bounds__(kConvThreads, 2)
    conv_kernel(BRAZE_GRID_CONSTANT(ConvArgumentOf<kForward>) a) {
  using Layout = ConvLayout<kColumns, kForward>;
  BRAZE_DYNAMIC_SHARED(uint4, shared);
  uint4* const kept = shared + 2 * Layout::kStage;
  const uint32_t tiles = (a.pixels.count + kTilePixels - 1) / kTilePixels;
  const int column = static_cast<int>(blockIdx.y) * kColumns;
  int now = 0;
  ConvSteps<S, kColumns, kForward> next(a);
  if (blockIdx.x < tiles) next.copy(shared);
#pragma unroll 1
  for (uint32_t tile = blockIdx.x; tile < tiles; tile += a.grid.splits) {
    WarpTile<kTilePixels, kColumns> product;
    product.clear();
    bool last;
#pragma unroll 1
    do {
      uint4* const stage = shared + now * Layout::kStage;
      cp_async_wait<0>();
      next.prepare(stage);
      __syncthreads();  // all of the step is there, and the other stage is free
      last = next.advance(tile + a.grid.splits);
      now ^= 1;
      if (!last || tile + a.grid.splits < tiles) next.copy(shared + now * Layout::kStage);
      product.template add<S, false, !kForward>(stage, stage + Layout::kStage - Layout::kTileB);
    } while (!last);
    // The last step's stage, which nothing is copied to before the next step's barrier.
    uint4* const stored = shared + (now ^ 1) * Layout::kStage;
    __syncthreads();  // all warps have read it
    product.template store<S>(stored);
    __syncthreads();  // all of the tile is there
    const int own = static_cast<int>(threadIdx.x % Layout::kChunks);
#pragma unroll 1
    for (int part = 0; part < Layout::kParts; ++part) {
      ConvStores<kColumns, kForward> stores(a, tile, column, part, stored);
      finish_part<S, kColumns>(a, stores, column + own * 8, kept,
                               tile < a.grid.splits && part == 0);
    }
  }
  __syncthreads();  // all have read the last tile
  finish_sums<Layout>(a, kept, reinterpret_cast<double*>(shared));
}

}  // namespace braze::cuda
