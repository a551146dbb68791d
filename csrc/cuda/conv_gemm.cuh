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
  static constexpr int kStores = kColumns == 64 ? 4 : 2;
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
    const int thread = computed_here(static_cast<int>(threadIdx.x));
    const bool in_depth = own_chunk() < a_.pixels.chunks;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const bool there = in_depth && rows_.there(i, tap_y(), tap_x());
      const int32_t chunk = rows_.chunk(a_.pixels, i, tap_y(), tap_x()) + own_chunk();
      uint4* const to = place(stage, i);
      copy_chunk(to, kForward ? a_.input.x : a_.grad.d, chunk, there);
      if constexpr (Layout::kTwoTiles) {
        if (a_.grad.coefficients != nullptr) {
          copy_chunk(to + Layout::kTileA, a_.grad.x, chunk, there);
        }
      }
    }
    // Weights: rows are channels of the result, or channels that are summed.
    constexpr int kChunks = kForward ? kStepChunks : Layout::kChunks;
    constexpr int kStep = kConvThreads / kChunks;  // rows
    const int row = thread / kChunks, column = thread % kChunks;
    const int tap = tap_y() * a_.kernel + tap_x(), taps = a_.kernel * a_.kernel;
    const int channel = row + (kForward ? first_column() : depth_chunk() * 8);
    const int chunk = kForward ? own_chunk() : first_column() / 8 + column;
    const int chunks = kForward ? a_.pixels.chunks : a_.width / 8;
    const int left = (kForward ? a_.width : a_.depth) - channel;
    uint4* const to = chunk_at<kChunks>(stage + Layout::kStage - Layout::kTileB, row, column);
    const int from = (channel * taps + tap) * chunks + chunk;
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      copy_chunk(to + i * kConvThreads, a_.weight, from + i * kStep * taps * chunks,
                 BRAZE_HOOK(own_columns, i * kStep < left) && chunk < chunks);
    }
    cp_async_commit();
  }

  // Of what copy() brought last, once it is there.
  __device__ __forceinline__ void prepare(uint4* stage) const {
    if (own_chunk() >= a_.pixels.chunks) return;
    const auto at = [&](int i) {
      return rows_.there(i, tap_y(), tap_x()) ? place(stage, i) : nullptr;
    };
    if constexpr (kForward) {
      if (a_.input.stats != nullptr) {
        activate_chunks<S, kRowsA>(a_.input, a_.depth, own_chunk() * 8, at);
      }
    } else if constexpr (Layout::kTwoTiles) {
      if (a_.grad.coefficients != nullptr) {
        differentiate_chunks<S, kRowsA>(a_.grad, a_.depth, own_chunk() * 8, Layout::kTileA, at);
      }
    }
  }

  // To the next step; true: it is the first of tile `next`, which there may not be.
  __device__ __forceinline__ bool advance(uint32_t next) {
    at_ += kStepChunks << 4;
    if (depth_chunk() < a_.pixels.chunks) return false;
    at_ = (at_ & 15) + 1;
    if (tap_x() < a_.kernel) return false;
    at_ = (at_ & 12) + 4;
    if (tap_y() < a_.kernel) return false;
    start(next);
    return true;
  }

 private:
  static __device__ __forceinline__ int first_column() {
    return static_cast<int>(blockIdx.y) * kColumns;
  }
  __device__ __forceinline__ int tap_x() const { return at_ & 3; }
  __device__ __forceinline__ int tap_y() const { return at_ >> 2 & 3; }
  __device__ __forceinline__ int depth_chunk() const { return at_ >> 4; }
  __device__ __forceinline__ int own_chunk() const {
    return depth_chunk() + static_cast<int>(threadIdx.x) % kStepChunks;
  }
  __device__ __forceinline__ uint4* place(uint4* stage, int i) const {
    const int thread = static_cast<int>(threadIdx.x);
    return chunk_at<kStepChunks>(stage, thread / kStepChunks, thread % kStepChunks) +
           i * kConvThreads;
  }
  __device__ __forceinline__ void start(uint32_t tile) {
    at_ = 0;
    rows_.start(a_.pixels, tile * kTilePixels + threadIdx.x / static_cast<uint32_t>(kStepChunks),
                kConvThreads / kStepChunks);
  }

  const ConvArgument& a_;
  PixelRows<kRowsA> rows_;
  int at_;  // depth_chunk << 4 | tap_y << 2 | tap_x
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
  int32_t chunk[Layout::kStores];  // -1: there is none
  Words words[Layout::kStores];

  __device__ __forceinline__ ConvStores(const ConvArgument& a, uint32_t tile, int column, int part,
                                        uint4* from) {
    const int thread = computed_here(static_cast<int>(threadIdx.x));
    const int own = thread % Layout::kChunks;
    const int row = thread / Layout::kChunks + part * Layout::kStores * Layout::kRowStep;
#pragma unroll
    for (int i = 0; i < Layout::kStores; ++i) {
      const uint32_t pixel = tile * kTilePixels + static_cast<uint32_t>(row + i * Layout::kRowStep);
      const bool there = BRAZE_HOOK(own_rows, pixel < a.pixels.count) &&
                         BRAZE_HOOK(own_channels, column + own * 8 < a.width);
      chunk[i] = there ? static_cast<int32_t>(pixel) * (a.width / 8) + column / 8 + own : -1;
      words[i] = words_of(load16(chunk_at<Layout::kChunks>(from, row, own) + i * kConvThreads));
    }
  }
  __device__ __forceinline__ void store(void* result) const {
#pragma unroll
    for (int i = 0; i < Layout::kStores; ++i) {
      if (chunk[i] >= 0) store16(static_cast<uint4*>(result) + chunk[i], raw_of(words[i]));
    }
  }
};

// Stores them and adds their values to the thread's moments.
template <class S, int kColumns>
__device__ __forceinline__ void finish_part(const ConvForwardArgument& a,
                                            const ConvStores<kColumns, true>& tile, int64_t,
                                            uint4* kept, bool first) {
  constexpr int kStores = ConvLayout<kColumns, true>::kStores;
  tile.store(a.result);
  float shift[8], sum[8] = {}, square[8] = {};
  if (first) {
    // The mean of the thread's first values: near enough, whatever the others are.
    int values = 0;
#pragma unroll
    for (int i = 0; i < kStores; ++i) values += tile.chunk[i] >= 0;
    const float part = 1 / static_cast<float>(values);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      shift[j] = 0;
#pragma unroll
      for (int i = 0; i < kStores; ++i) {
        if (tile.chunk[i] >= 0) shift[j] += tile.words[i].template get<S>(j);
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
    if (BRAZE_HOOK(uncounted_row, tile.chunk[i] < 0)) continue;
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
                                            ConvStores<kColumns, false>& tile, int64_t channel,
                                            uint4* kept, bool first) {
  constexpr int kStores = ConvLayout<kColumns, false>::kStores;
  if (a.input.stats != nullptr && BRAZE_HOOK(has_channel, channel < a.width)) {
    Words x[kStores];
#pragma unroll
    for (int i = 0; i < kStores; ++i) {
      const bool there = tile.chunk[i] >= 0;
      x[i] =
          there ? words_of(load16(static_cast<const uint4*>(a.input.x) + tile.chunk[i])) : Words{};
    }
    const ChunkNormalizer z(a.input.stats, a.width, channel);
    const auto parameter = static_cast<float>(a.input.parameter);
    with_activation<is_recomputed>(a.input.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < kStores; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          tile.words[i].template set<S>(
              j, activation_gradient<decltype(activation)::value>(
                     tile.words[i].template get<S>(j), z(x[i].template get<S>(j), j), parameter));
        }
      }
    });
    float grad[8] = {}, grad_input[8] = {};
    if (!first) {
      kept8(grad, kept, 0);
      kept8(grad_input, kept, 1);
    }
#pragma unroll
    for (int i = 0; i < kStores; ++i) {
      if (tile.chunk[i] < 0) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        add_gradient(tile.words[i].template get<S>(j), x[i].template get<S>(j), z.mean[j], grad[j],
                     grad_input[j]);
      }
    }
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
    product.for_pairs([&](int rows, int row, int columns, int at, float first, float second) {
      uint4* const chunk =
          chunk_at<Layout::kChunks>(stored + rows * Layout::kChunks, row, columns / 8);
      reinterpret_cast<uint32_t*>(chunk)[at / 2] = pair_of<S>(first, second);
    });
    __syncthreads();  // all of the tile is there
    const int own = static_cast<int>(threadIdx.x) % Layout::kChunks;
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
