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

// What a kernel is made for. Any: all tensors and activations, the latter by run-time choice.
struct Any {
  static constexpr bool kPlain = false, kMask = false;
  static constexpr bool (*kTakes)(Activation) = is_not_curved;
};
// Curved activations, whose derivatives cost registers.
struct AnyCurved : Any {
  static constexpr bool (*kTakes)(Activation) = is_curved;
};
struct AnyMask : Any {
  static constexpr bool kMask = true;
};
// Plain: tensors of whole 16-byte units at 16-byte boundaries, and one activation, so that hardly
// anything is left to decide.
struct PlainIdentity {
  static constexpr bool kPlain = true, kMask = false;
  static constexpr Activation kActivation = Activation::identity;
};
struct PlainRelu : PlainIdentity {
  static constexpr Activation kActivation = Activation::relu;
};
struct PlainMask : PlainRelu {
  static constexpr bool kMask = true;
};

// Blocks of one multiprocessor, which decide on the registers of a thread.
template <int kInputs, class Mode>
constexpr int kBlocksAtOnce = kInputs == 1 || Mode::kPlain ? 2 : 1;

template <class Mode, class F>
__device__ __forceinline__ void with_activation_of(Activation activation, F&& f) {
  if constexpr (Mode::kPlain) {
    f(std::integral_constant<Activation, Mode::kActivation>{});
  } else {
    with_activation<Mode::kTakes>(activation, f);
  }
}

// kPlain: `vector` or empty.
template <bool kPlain>
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
template <class S, int kLanes, bool kBackwards, bool kPlainUnits>
class Walk {
 public:
  static constexpr bool kPlain = kPlainUnits;

  __device__ __forceinline__ Walk(const NormGrid& grid, uint32_t block)
      : grid_(grid), group_(group_of(grid, block)) {
    const int64_t active = grid.active, thread = threadIdx.x;
    const int64_t first = split_of(grid, block) * active + thread;
    const int64_t units = grid.rows * grid.words, stride = grid.splits * active;
    left_ = BRAZE_HOOK(active_thread, thread < active) && BRAZE_HOOK(has_units, first < units)
                ? static_cast<int>(BRAZE_HOOK(own_units, (units - 1 - first) / stride + 1))
                : 0;
    const int64_t start =
        BRAZE_HOOK(groups_of_channels, grid.per_lane) ? group_ * grid.words * kLanes : 0;
    const int64_t from =
        BRAZE_HOOK(walks_back, kBackwards && left_ > 0) ? first + (left_ - 1) * stride : first;
    const int64_t row = from / grid.words;
    word_ = static_cast<int>(from - row * grid.words);
    row_ = BRAZE_HOOK(row_of_all, grid.per_lane) ? row : row * grid.channels + group_;
    base_ = row_ * grid.length + start;
    if (grid.per_lane && start + int64_t{word_} * kLanes >= grid.length) left_ = 0;
  }

  __device__ __forceinline__ int left() const { return left_; }

  // The next unit, or an empty one when none is left. kSure: one is.
  template <bool kSure>
  __device__ __forceinline__ Unit<kPlain> next() {
    constexpr uint32_t kAll = (1u << kLanes) - 1;
    Unit<kPlain> unit;
    unit.offset = base_ + int64_t{word_} * kLanes;
    if constexpr (kPlain) {
      unit.vector = kSure || BRAZE_HOOK(units_left, left_ > 0);
      unit.lanes = unit.vector ? kAll : 0;
      unit.mask = unit.offset >> 3;
      unit.bit = static_cast<uint32_t>(unit.offset & 7);
    } else {
      const int64_t row_offset = row_ * grid_.length;
      if (grid_.moves_to_phase) unit.offset -= (grid_.phase + row_offset) & (kLanes - 1);
      const int64_t begin = unit.offset - row_offset;
      unit.mask = row_ * grid_.mask_row + (begin >> 3);
      unit.bit = static_cast<uint32_t>(begin & 7);
      const int64_t rest = BRAZE_HOOK(units_left, left_ > 0) ? grid_.length - begin : 0;
      unit.lanes = rest >= BRAZE_HOOK(whole_unit, kLanes) ? kAll
                   : rest > 0 ? kAll >> BRAZE_HOOK(missing_lanes, kLanes - rest)
                              : 0;
      if (BRAZE_HOOK(before_begin, begin < 0))
        unit.lanes &= kAll << BRAZE_HOOK(lanes_before, -begin);
      unit.vector = BRAZE_HOOK(aligned, grid_.aligned) &&
                    BRAZE_HOOK(all_lanes, unit.lanes == kAll) &&
                    ((BRAZE_HOOK(unit_phase, grid_.phase) + unit.offset) & (kVector<S> - 1)) == 0;
    }
    advance();
    return unit;
  }

 private:
  __device__ __forceinline__ void advance() {
    constexpr int kSign = kBackwards ? -1 : 1;
    --left_;
    word_ += kSign * grid_.stride_words;
    row_ += kSign * grid_.stride_rows;
    base_ += kSign * grid_.stride_base;
    if (kBackwards ? BRAZE_HOOK(row_begins, word_) < 0 : word_ >= BRAZE_HOOK(words, grid_.words)) {
      word_ -= kSign * grid_.words;
      row_ += kSign * grid_.next_row;
      base_ += kSign * grid_.next_base;
    }
  }

  const NormGrid& grid_;
  int64_t group_;
  int64_t row_;   // of all rows of memory
  int64_t base_;  // where the group's part of the row begins
  int word_, left_;
};

// f(whole, first) for every kUnroll units that are left: whole is true_type where all of them are
// there and plain, first is true for the first ones.
template <int kUnroll, class Walk, class F>
__device__ __forceinline__ void for_units(Walk& walk, F&& f) {
#pragma unroll 1
  for (bool first = true; walk.left() > 0; first = false) {
    f(std::false_type{}, first);
    if constexpr (Walk::kPlain) {
#pragma unroll 1
      while (walk.left() >= kUnroll) f(std::true_type{}, false);
    }
  }
}

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

  template <bool kPlain>
  __device__ __forceinline__ void load(const void* data, const Unit<kPlain>& unit) {
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
    if constexpr (!kPlain) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        if (unit.has(j)) set(j, static_cast<T>(from_storage(from[j])));
      }
    }
  }

  // Of a tensor that may be absent: then zeros.
  template <bool kPlain>
  __device__ __forceinline__ void load(const void* data, const Unit<kPlain>& unit, bool present) {
    if (present) {
      load(data, unit);
    } else {
      clear();
    }
  }

  template <bool kPlain>
  __device__ __forceinline__ void store(void* data, const Unit<kPlain>& unit) const {
    S* const to = static_cast<S*>(data) + unit.offset;
    if (unit.vector) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const Words& w = words[i];
        store16(to + i * kVector<S>, make_uint4(w.word[0], w.word[1], w.word[2], w.word[3]));
      }
      return;
    }
    if constexpr (!kPlain) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        if (BRAZE_HOOK(stored_lane, unit.has(j))) to_storage(get(j), to[j]);
      }
    }
  }
};

// The channel of each lane of a thread, among those of its group.
template <int kLanes>
struct Channels {
  int64_t first;  // of the group
  int of[kLanes];

  __device__ __forceinline__ Channels(const NormGrid& grid, uint32_t block)
      : first(int64_t{group_of(grid, block)} * grid.width) {
    int channel = 0, place = 0;  // place: among the elements that a row has of the channel
    if (BRAZE_HOOK(own_channel, grid.per_lane)) {
      const int element = static_cast<int>(threadIdx.x) % grid.words * kLanes;
      channel = element / grid.share;
      place = element - channel * grid.share;
    }
    const int last = static_cast<int>(min(int64_t{grid.width}, grid.channels - first)) - 1;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      of[j] = min(channel, last);
      if (grid.per_lane && ++place == BRAZE_HOOK(share, grid.share)) {
        place = 0;
        ++channel;
      }
    }
  }

  // Of T from[], which begins with the group's first channel.
  template <class T>
  __device__ __forceinline__ void load(T (&values)[kLanes], const T* from) const {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) values[j] = from[of[j]];
  }
  // Row `row` of T table[][channels].
  template <class T>
  __device__ __forceinline__ void load(T (&values)[kLanes], const void* table, int row,
                                       const NormGrid& grid) const {
    load(values, static_cast<const T*>(table) + row * grid.channels + first);
  }
};

// What turns one input into z.
template <class T, int kLanes>
struct Normalizer {
  T mean[kLanes], scale[kLanes], shift[kLanes];

  __device__ __forceinline__ void load(const void* stats, const NormGrid& grid,
                                       const Channels<kLanes>& channels) {
    channels.load(mean, stats, kMean, grid);
    channels.load(scale, stats, kScale, grid);
    channels.load(shift, stats, kShift, grid);
  }
  __device__ __forceinline__ T operator()(T x, int j) const {
    return normalize(x, mean[j], scale[j], shift[j]);
  }
};

// --- one channel's numbers ---

__device__ __forceinline__ double load_number(const void* data, DType dtype, int64_t i,
                                              double otherwise) {
  return data == nullptr ? otherwise : Single<double>::load(data, dtype, i);
}

template <class T>
__device__ __forceinline__ BatchNormStats<T> stats_of(int64_t c, double mean, double variance,
                                                      const BatchNormChannels& b) {
  return make_stats<T>(mean, variance, b.eps, load_number(b.weight, b.param_dtype, c, 1),
                       load_number(b.bias, b.param_dtype, c, 0));
}

template <class T>
__device__ __forceinline__ void write_stats(void* stats, int64_t channels, int64_t c,
                                            const BatchNormStats<T>& s) {
  T* const to = static_cast<T*>(stats) + c;
  to[kMean * channels] = s.mean;
  to[kMeanLow * channels] = s.mean_low;
  to[kInvstd * channels] = s.invstd;
  to[kScale * channels] = s.scale;
  to[kShift * channels] = s.shift;
}

// --- the end of a reduction ---

// Items of a thread that are merged at once: more cost registers, fewer cost barriers.
constexpr int kTogether = 4;
// Doubles in shared memory that the merges below need.
template <class Item>
constexpr int kMergeNumbers = kTogether * Item::kNumbers * (kNormThreads / 2);

template <class Item>
__device__ __forceinline__ void put(double* shared, int slot, int slots, const Item& item) {
#pragma unroll
  for (int k = 0; k < Item::kNumbers; ++k) shared[k * slots + slot] = item.number[k];
}
template <class Item>
__device__ __forceinline__ Item get(const double* shared, int slot, int slots) {
  Item item;
#pragma unroll
  for (int k = 0; k < Item::kNumbers; ++k) item.number[k] = shared[k * slots + slot];
  return item;
}

// Merges the first `items` of the rows of a block into those of row 0, in an order that the number
// of rows alone decides: every row below the middle takes the one half the rows further down. The
// thread is at (row, column).
template <class Item, int kItems>
__device__ __forceinline__ void merge_rows(Item (&mine)[kItems], int items, int rows, int row,
                                           int column, int columns, double* shared) {
  constexpr int kSlots = kNormThreads / 2, kEach = Item::kNumbers * kSlots;
  for (int n = rows; n > 1;) {
    const int half = BRAZE_HOOK(rows_and_one, n + 1) / 2;
    const bool lower = row < BRAZE_HOOK(upper_rows, n - half);
    if (BRAZE_HOOK(in_one_warp, n * columns <= 32)) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (j >= items) continue;
        Item other;
#pragma unroll
        for (int k = 0; k < Item::kNumbers; ++k) {
          other.number[k] = __shfl_down_sync(0xffffffffu, mine[j].number[k], half * columns);
        }
        if (lower) mine[j].merge(other);
      }
    } else {
      if (row >= half && row < n) {
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
          if (j < items) put(shared + j * kEach, (row - half) * columns + column, kSlots, mine[j]);
        }
      }
      __syncthreads();
      if (lower) {
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
          if (j < items)
            mine[j].merge(get<Item>(shared + j * kEach, row * columns + column, kSlots));
        }
      }
      __syncthreads();
    }
    n = half;
  }
}

// f(i, item) for i < width, with partials[s][i] merged over s < count; `stride` items from s to
// s + 1.
template <class Item, class F>
__device__ __forceinline__ void merge_parts(const Item* partials, uint32_t count, int64_t stride,
                                            int width, double* shared, F&& f) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int columns = BRAZE_HOOK(narrow_grid, width < threads) ? width : threads;
  const int parts = threads / columns, part = thread / columns, column = thread - part * columns;
  const uint32_t each = BRAZE_HOOK(splits_each, (count - 1) / static_cast<uint32_t>(parts) + 1);
  for (int begin = 0; begin < width; begin += columns) {
    Item item[1] = {};
    const int i = begin + column;
    if (part < parts && i < width) {
      const uint64_t first = static_cast<uint64_t>(part) * each;
      const uint64_t end = BRAZE_HOOK(whole_part, first + each < count) ? first + each : count;
#pragma unroll 4
      for (uint64_t s = first; s < end; ++s) {
        item[0].merge(partials[static_cast<int64_t>(s) * stride + i]);
      }
    }
    merge_rows(item, 1, parts, part, column, columns, shared);
    if (BRAZE_HOOK(writes_part, part == 0) && i < width) f(i, item[0]);
  }
}

// The end of a reduction, by block `split` of group `group`: merges the items of a block's rows, of
// its lanes, and, in the last block of a group to come here, those of the group's blocks. There it
// calls f(channel, item) for every channel of the group and returns true. make(lane) gives a
// thread's items: one per lane, or lane 0's alone where a block has one channel. `partials` are
// [groups][splits][width], `tickets` what norm_tickets() says.
template <class Item, int kLanes, class Make, class F>
__device__ __forceinline__ bool reduce_group(const NormGrid& grid, uint32_t group, uint32_t split,
                                             Item* partials, unsigned int* tickets, double* shared,
                                             Make&& make, F&& f) {
  constexpr int kAtOnce = kLanes < kTogether ? kLanes : kTogether;
  const int thread = static_cast<int>(threadIdx.x), width = grid.width;
  const int columns = grid.per_lane ? grid.words : 1, lanes = grid.per_lane ? kLanes : 1;
  const int row = thread / columns, column = thread - row * columns;
  Item* const all = partials + static_cast<int64_t>(group) * grid.splits * width;
  Item* const own = all + static_cast<int64_t>(split) * width;
  // A unit of an image has elements of one channel, or of two.
  const bool image = BRAZE_HOOK(shared_channel, grid.per_lane && grid.share > 1);
  const int rest = image ? grid.share - column * kLanes % grid.share : 0;  // lanes of the first
  Item channel[2] = {};
#pragma unroll
  for (int lane = 0; lane < kLanes; lane += kAtOnce) {
    if (lane >= lanes) continue;
    Item mine[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) mine[j] = make(lane + j);
    merge_rows(mine, lanes - lane, grid.active / columns, row, column, columns, shared);
    if (BRAZE_HOOK(writes_row, row == 0)) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (image) {
          lane + j < rest ? channel[0].merge(mine[j]) : channel[1].merge(mine[j]);
        } else if (BRAZE_HOOK(partial_items, lane + j < lanes)) {
          own[column * lanes + lane + j] = mine[j];
        }
      }
    }
  }
  if (image) {
    if (row == 0) {
      put(shared, column, kNormThreads, channel[0]);
      put(shared + Item::kNumbers * kNormThreads, column, kNormThreads, channel[1]);
    }
    __syncthreads();
    for (int c = thread; c < width; c += static_cast<int>(blockDim.x)) {
      const int begin = c * grid.share, last = (begin + grid.share - 1) / kLanes;
      Item item = {};
      for (int word = begin / kLanes; word <= last; ++word) {
        const bool second = word * kLanes < BRAZE_HOOK(channel_begin, begin);
        item.merge(
            get<Item>(shared + (second ? Item::kNumbers * kNormThreads : 0), word, kNormThreads));
      }
      own[c] = item;
    }
  }
  // Blocks of the group merge in one step, or in two: those of a part, then what the parts gave.
  bool in_parts = grid.splits > kOneLevel;
#pragma unroll 1
  for (;; in_parts = false) {
    const uint32_t parts = norm_parts(grid.splits), part = split / kFan;
    const bool of_parts = grid.splits > kOneLevel && !in_parts;
    const uint32_t first = in_parts ? part * kFan : 0;
    const uint32_t blocks = in_parts   ? min(uint32_t{kFan}, grid.splits - first)
                            : of_parts ? parts
                                       : grid.splits;
    const int64_t stride =
        of_parts ? BRAZE_HOOK(part_stride, int64_t{kFan} * width) : int64_t{width};
    unsigned int* const ticket = tickets + (in_parts ? grid.groups + group * parts + part : group);
    if (!is_last_block(ticket, blocks)) return false;
    Item* const here = all + static_cast<int64_t>(first) * width;
    merge_parts(here, blocks, stride, width, shared, [&](int i, const Item& item) {
      const int64_t c = static_cast<int64_t>(group) * width + i;
      if (in_parts) {
        here[i] = item;
      } else if (BRAZE_HOOK(has_channel, c < grid.channels)) {
        f(c, item);
      }
    });
    if (!in_parts) return true;
  }
}

}  // namespace braze::cuda
