// What the batch-norm kernels share: which units a thread has, a unit's elements, the numbers of
// its channels, and the activation by run-time choice.
#pragma once
#include <type_traits>

#include "../math/batch_norm.h"
#include "../math/hook.h"
#include "../plan/batch_norm.h"
#include "batch_norm_grid.h"
#include "elements.cuh"
#include "last_block.cuh"

namespace braze::cuda {

// Elements of one 16-byte access.
template <class S>
constexpr int kVector = 16 / sizeof(S);

struct Unit {
  int64_t offset;  // of lane 0, in elements
  int64_t mask;    // of the byte that has lane 0's bit
  uint32_t bit;    // which one that is
  uint32_t lanes;  // bit by bit, those that are elements of the group
  bool vector;     // all are, and lane 0 is at a 16-byte boundary

  __device__ __forceinline__ bool has(int lane) const { return lanes >> lane & 1u; }
};

__device__ __forceinline__ uint32_t group_of(const NormGrid& grid, uint32_t block) {
  return block / grid.splits;
}
__device__ __forceinline__ uint32_t split_of(const NormGrid& grid, uint32_t block) {
  return block - block / grid.splits * grid.splits;
}

// A thread's units, first to last, or last to first: what the pass before read last may be in the
// cache still.
template <class S, int kLanes, bool kBackwards>
class Walk {
 public:
  __device__ __forceinline__ Walk(const NormGrid& grid, uint32_t block)
      : grid_(grid), group_(group_of(grid, block)) {
    const int64_t active = grid.active, thread = threadIdx.x;
    const int64_t first = split_of(grid, block) * active + thread;
    const int64_t units = grid.rows * grid.words, stride = grid.splits * active;
    left_ = BRAZE_HOOK(active_thread, thread < active) && BRAZE_HOOK(has_units, first < units)
                ? BRAZE_HOOK(own_units, (units - 1 - first) / stride + 1)
                : 0;
    start_ = BRAZE_HOOK(groups_of_channels, grid.channels_last) ? group_ * grid.words * kLanes : 0;
    const int64_t from =
        BRAZE_HOOK(walks_back, kBackwards && left_ > 0) ? first + (left_ - 1) * stride : first;
    row_ = from / grid.words;
    word_ = from - row_ * grid.words;
    if (grid.channels_last && start_ + word_ * kLanes >= grid.length) left_ = 0;
  }

  __device__ __forceinline__ int64_t left() const { return left_; }

  // The channel of lane 0, and whether the next lane has the next one.
  __device__ __forceinline__ int64_t channel() const {
    return grid_.channels_last ? start_ + word_ * kLanes : group_;
  }

  // An empty one when none is left.
  __device__ __forceinline__ Unit next() {
    Unit unit;
    const int64_t row =
        BRAZE_HOOK(row_of_all, grid_.channels_last) ? row_ : row_ * grid_.channels + group_;
    const int64_t row_offset = row * grid_.length;
    int64_t begin = start_ + word_ * kLanes;
    if (grid_.moves_to_phase) begin -= (grid_.phase + row_offset) & (kLanes - 1);
    unit.offset = row_offset + begin;
    unit.mask = row * grid_.mask_row + (begin >> 3);
    unit.bit = static_cast<uint32_t>(begin & 7);
    constexpr uint32_t kAll = (1u << kLanes) - 1;
    const int64_t rest = BRAZE_HOOK(units_left, left_ > 0) ? grid_.length - begin : 0;
    unit.lanes = rest >= BRAZE_HOOK(whole_unit, kLanes) ? kAll
                 : rest > 0 ? kAll >> BRAZE_HOOK(missing_lanes, kLanes - rest)
                            : 0;
    if (BRAZE_HOOK(before_begin, begin < 0)) unit.lanes &= kAll << BRAZE_HOOK(lanes_before, -begin);
    unit.vector = BRAZE_HOOK(aligned, grid_.aligned) && BRAZE_HOOK(all_lanes, unit.lanes == kAll) &&
                  ((BRAZE_HOOK(unit_phase, grid_.phase) + unit.offset) & (kVector<S> - 1)) == 0;
    advance();
    return unit;
  }

 private:
  __device__ __forceinline__ void advance() {
    --left_;
    if constexpr (kBackwards) {
      row_ -= grid_.stride_rows;
      word_ -= grid_.stride_words;
      if (BRAZE_HOOK(row_begins, word_) < 0) {
        word_ += grid_.words;
        --row_;
      }
    } else {
      row_ += grid_.stride_rows;
      word_ += grid_.stride_words;
      if (word_ >= BRAZE_HOOK(words, grid_.words)) {
        word_ -= grid_.words;
        ++row_;
      }
    }
  }

  const NormGrid& grid_;
  int64_t group_, start_, left_, row_, word_;
};

// A unit's elements. Lanes that it lacks are zeros, and never written.
template <class S, int kLanes>
struct Pack {
  using T = Arithmetic<S>;
  static constexpr int kWords = kLanes / kVector<S>;
  Words words[kWords];

  __device__ __forceinline__ T get(int j) const {
    return static_cast<T>(words[j / kVector<S>].template get<S>(j % kVector<S>));
  }
  __device__ __forceinline__ void set(int j, T value) {
    words[j / kVector<S>].template set<S>(j % kVector<S>, value);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = {};
  }

  __device__ __forceinline__ void load(const void* data, const Unit& unit) {
    const S* const from = static_cast<const S*>(data) + unit.offset;
    if (unit.vector) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint4 raw = load16(from + i * kVector<S>);
        words[i] = {{raw.x, raw.y, raw.z, raw.w}};
      }
      return;
    }
    clear();
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      if (unit.has(j)) set(j, static_cast<T>(from_storage(from[j])));
    }
  }

  // Of a tensor that may be absent: then zeros.
  __device__ __forceinline__ void load(const void* data, const Unit& unit, bool present) {
    if (present) {
      load(data, unit);
    } else {
      clear();
    }
  }

  __device__ __forceinline__ void store(void* data, const Unit& unit) const {
    S* const to = static_cast<S*>(data) + unit.offset;
    if (unit.vector) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const Words& w = words[i];
        store16(to + i * kVector<S>, make_uint4(w.word[0], w.word[1], w.word[2], w.word[3]));
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      if (BRAZE_HOOK(stored_lane, unit.has(j))) to_storage(get(j), to[j]);
    }
  }
};

// One number per lane, of the lane's channel, from row `row` of T table[][channels].
template <class T, int kLanes>
__device__ __forceinline__ void load_channels(T (&values)[kLanes], const void* table, int row,
                                              const NormGrid& grid, int64_t channel) {
  const T* const from = static_cast<const T*>(table) + row * grid.channels;
#pragma unroll
  for (int j = 0; j < kLanes; ++j) {
    const int64_t mine = BRAZE_HOOK(own_channel, grid.channels_last) ? channel + j : channel;
    values[j] = mine < grid.channels ? from[mine] : T(0);
  }
}

// What turns one input into z.
template <class T, int kLanes>
struct Normalizer {
  T mean[kLanes], scale[kLanes], shift[kLanes];

  __device__ __forceinline__ void load(const void* stats, const NormGrid& grid, int64_t channel) {
    load_channels(mean, stats, kMean, grid, channel);
    load_channels(scale, stats, kScale, grid, channel);
    load_channels(shift, stats, kShift, grid, channel);
  }
  __device__ __forceinline__ T operator()(T x, int j) const {
    return normalize(x, mean[j], scale[j], shift[j]);
  }
};

// Curved activations, whose derivatives cost registers, and the others have kernels of their own.
template <bool kCurved>
constexpr bool (*kKernelTakes)(Activation) = kCurved ? is_curved : is_not_curved;

// Lanes whose items cross shared memory at once: more cost registers, fewer cost barriers.
template <int kLanes>
constexpr int kMergedTogether = kLanes == 1 ? 1 : 2;
template <class Item, int kLanes>
constexpr int kMergeNumbers = kMergedTogether<kLanes> * Item::kNumbers * (kNormThreads / 2);

// Merges the rows of a block into row 0, in an order that their number alone decides. A thread is
// at (row, column) and has one item per lane, of which the first `lanes` count; `make` gives a
// lane's item, `take` gets what row 0 made of it.
template <class Item, int kLanes, class Make, class Take>
__device__ __forceinline__ void merge_rows(int lanes, int rows, int row, int column, int columns,
                                           double* shared, Make&& make, Take&& take) {
  constexpr int kSlots = kNormThreads / 2, kTogether = kMergedTogether<kLanes>;
#pragma unroll
  for (int lane = 0; lane < kLanes; lane += kTogether) {
    if (lane >= lanes) continue;
    Item mine[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) mine[i] = make(lane + i);
    for (int n = rows; n > 1;) {
      const int half = BRAZE_HOOK(rows_and_one, n + 1) / 2;
      if (row >= half && row < n) {
        const int slot = (row - half) * columns + column;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
#pragma unroll
          for (int k = 0; k < Item::kNumbers; ++k) {
            shared[(i * Item::kNumbers + k) * kSlots + slot] = mine[i].number[k];
          }
        }
      }
      __syncthreads();
      if (row < BRAZE_HOOK(upper_rows, n - half)) {
        const int slot = row * columns + column;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          Item other;
#pragma unroll
          for (int k = 0; k < Item::kNumbers; ++k) {
            other.number[k] = shared[(i * Item::kNumbers + k) * kSlots + slot];
          }
          mine[i].merge(other);
        }
      }
      __syncthreads();
      n = half;
    }
    if (BRAZE_HOOK(writes_row, row == 0)) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) take(lane + i, mine[i]);
    }
  }
}

// In the last block of a group: f(channel, item) for every channel of the group, with the items of
// all its blocks merged in their order, where partials[split][width] are the group's.
template <class Item, class F>
__device__ __forceinline__ void merge_splits(const NormGrid& grid, uint32_t group,
                                             const Item* partials, double* shared, F&& f) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int width = grid.width,
            columns = BRAZE_HOOK(narrow_grid, width < threads) ? width : threads;
  const int parts = threads / columns, part = thread / columns, column = thread - part * columns;
  const uint32_t each =
      BRAZE_HOOK(splits_each, (grid.splits - 1) / static_cast<uint32_t>(parts) + 1);
  for (int begin = 0; begin < width; begin += columns) {
    Item item = {};
    const int i = begin + column;
    if (part < parts && i < width) {
      const uint64_t first = static_cast<uint64_t>(part) * each;
      const uint64_t end =
          BRAZE_HOOK(whole_part, first + each < grid.splits) ? first + each : grid.splits;
      for (uint64_t s = first; s < end; ++s) {
        item.merge(partials[s * static_cast<uint64_t>(width) + static_cast<uint64_t>(i)]);
      }
    }
    merge_rows<Item, 1>(
        1, parts, part, column, columns, shared, [&](int) { return item; },
        [&](int, const Item& merged) {
          const int64_t channel = static_cast<int64_t>(group) * width + i;
          if (i < width && BRAZE_HOOK(has_channel, channel < grid.channels)) f(channel, merged);
        });
  }
}

}  // namespace braze::cuda
