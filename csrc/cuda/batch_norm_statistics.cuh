// Batch normalisation: mean and variance of each channel, the running statistics, and what the
// other passes need of them. Formulas: math/batch_norm.h.
#pragma once
#include "../math/hook.h"
#include "batch_norm_units.cuh"

namespace braze::cuda {

// Moments as numbers, for merge_rows.
struct MomentsItem {
  static constexpr int kNumbers = 4;
  double number[kNumbers];

  __device__ __forceinline__ Moments moments() const {
    return {number[0], number[1], number[2], number[3]};
  }
  __device__ __forceinline__ void set(const Moments& m) {
    number[0] = m.shift;
    number[1] = m.count;
    number[2] = m.sum;
    number[3] = m.square;
  }
  __device__ __forceinline__ void merge(const MomentsItem& other) {
    Moments mine = moments();
    merge_moments(mine, other.moments());
    set(mine);
  }
};

struct StatisticsArgument {
  StatisticsArgs args;
  NormGrid grid;
  MomentsItem* partials;  // [groups][splits][width]
  unsigned int* tickets;  // norm_tickets(grid), zero
};

struct CombineArgument {
  CombineArgs args;
  unsigned int* ticket;  // zero
};

// Of a batch, with what the running statistics take from it.
template <class T>
__device__ __forceinline__ void finish_channel(void* stats, int64_t channels, int64_t c,
                                               const ChannelMoments& m,
                                               const BatchNormChannels& b) {
  write_stats(stats, channels, c, stats_of<T>(c, m.mean, variance_of(m), b));
  if (b.running_mean == nullptr || BRAZE_HOOK(no_values, m.count == 0)) return;
  double momentum = b.momentum;
  if (BRAZE_HOOK(cumulative, b.cumulative))
    momentum = 1 / (static_cast<double>(*b.batches_tracked) + BRAZE_HOOK(this_batch, 1));
  const auto update = [&](void* running, double value) {
    const double old = Single<double>::load(running, b.running_dtype, c);
    Single<double>::store(running, b.running_dtype, c, update_running(old, value, momentum));
  };
  BRAZE_HOOK(running_mean, update(b.running_mean, m.mean));
  update(b.running_var, BRAZE_HOOK(running_var, unbiased_variance_of(m)));
}

// By the last of `finishers` blocks that have read the count.
__device__ __forceinline__ void count_batch(int64_t* batches_tracked, unsigned int* ticket,
                                            uint32_t finishers) {
  if (batches_tracked == nullptr) return;
  if (is_last_block(ticket, finishers) && BRAZE_HOOK(counts_batch, threadIdx.x == 0))
    *batches_tracked += 1;
}

// --- the kernels ---

template <class S, class Mode>
__global__ void __launch_bounds__(kNormThreads, 2)
    batch_norm_statistics_kernel(BRAZE_GRID_CONSTANT(StatisticsArgument) a) {
  using T = Arithmetic<S>;
  constexpr int kLanes = kVector<S>, kUnroll = 4;
  BRAZE_SHARED(double, shared, kMergeNumbers<MomentsItem>);
  const NormGrid& grid = a.grid;
  Walk<S, kLanes, false, Mode::kPlain> walk(grid, blockIdx.x);
  T shift[kLanes] = {}, sum[kLanes] = {}, square[kLanes] = {};
  int count = 0;  // of values per lane, or of all lanes where they are one channel's
  for_units<kUnroll>(walk, [&](auto whole, bool first) {
    constexpr bool kWhole = decltype(whole)::value;
    Unit<Mode::kPlain> units[kUnroll];
    Pack<S, kLanes> x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) units[i] = walk.template next<kWhole>();
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) x[i].load(a.args.x, units[i]);
    int values = 0;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      values +=
          BRAZE_HOOK(values_last, grid.per_lane) ? units[i].lanes != 0 : __popc(units[i].lanes);
    }
    if (!kWhole && first) {
      // The mean of the thread's first values: near enough, whatever the others hold.
      T all = 0;
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) shift[j] += x[i].get(j);
        all += shift[j];
      }
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        shift[j] = make_shift(BRAZE_HOOK(shift_each, grid.per_lane) ? shift[j] : all,
                              static_cast<T>(values));
      }
    }
    count += values;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        add_moment(BRAZE_HOOK(counted_lane, units[i].has(j)) ? x[i].get(j) : shift[j], shift[j],
                   sum[j], square[j]);
      }
    }
  });

  const auto item_of = [&](int lane) {
    double all = sum[lane], all_squares = square[lane];
    if (BRAZE_HOOK(one_shift, !grid.per_lane)) {  // one channel, one shift
#pragma unroll
      for (int j = 1; j < kLanes; ++j) {
        all += sum[j];
        all_squares += square[j];
      }
    }
    MomentsItem item;
    item.set({shift[lane], static_cast<double>(count), all, all_squares});
    return item;
  };
  const auto finish = [&](int64_t c, const MomentsItem& item) {
    const ChannelMoments m = channel_moments(item.moments());
    if (a.args.moments == nullptr) {
      finish_channel<T>(a.args.stats, grid.channels, c, m, a.args.channels);
      return;
    }
    T* const to = static_cast<T*>(a.args.moments) + c;
    to[kMomentsMean * grid.channels] = static_cast<T>(m.mean);
    to[kMomentsM2 * grid.channels] = static_cast<T>(m.m2);
    to[kMomentsCount * grid.channels] = static_cast<T>(m.count);
  };
  if (!reduce_group<MomentsItem, kLanes>(grid, group_of(grid, blockIdx.x),
                                         split_of(grid, blockIdx.x), a.partials, a.tickets, shared,
                                         item_of, finish)) {
    return;
  }
  if (BRAZE_HOOK(no_moments, a.args.moments == nullptr)) {
    count_batch(a.args.channels.batches_tracked, a.tickets + norm_tickets(grid) - 1,
                BRAZE_HOOK(group_finishers, grid.groups));
  }
}

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_combine_kernel(BRAZE_GRID_CONSTANT(CombineArgument) a) {
  const int64_t channels = a.args.shape.c;
  const int64_t c = int64_t{blockIdx.x} * kNormThreads + threadIdx.x;
  if (c < BRAZE_HOOK(finished_channels, channels)) {
    Moments all;
    const T* from = static_cast<const T*>(a.args.moments) + c;
    for (int64_t process = 0; process < BRAZE_HOOK(processes, a.args.processes); ++process) {
      merge_moments(all, moments_of({static_cast<double>(from[kMomentsMean * channels]),
                                     static_cast<double>(from[kMomentsM2 * channels]),
                                     static_cast<double>(from[kMomentsCount * channels])}));
      from += kMomentsRows * channels;
    }
    finish_channel<T>(a.args.stats, channels, c, channel_moments(all), a.args.channels);
  }
  count_batch(a.args.channels.batches_tracked, a.ticket, BRAZE_HOOK(block_finishers, gridDim.x));
}

}  // namespace braze::cuda
