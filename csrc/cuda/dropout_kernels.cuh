// Dropout: one block per chunk of memory. A thread makes the random numbers of its elements while
// their loads are under way.
#pragma once
#include <type_traits>

#include "../math/hook.h"
#include "../plan/dropout.h"
#include "dropout_launch.h"
#include "elements.cuh"

namespace braze::cuda {

constexpr int kDropoutThreads = 256;

__device__ __forceinline__ RandomLanes block_lanes(const RandomState& random, uint64_t block) {
  return random_lanes(BRAZE_HOOK(seed, random.seed), BRAZE_HOOK(offset, random.offset),
                      BRAZE_HOOK(random_block, block));
}

// Lane `first` and those that follow it in an access become the first ones.
__device__ __forceinline__ RandomLanes lanes_from(RandomLanes lanes, uint64_t first) {
  uint32_t (&word)[4] = lanes.word;
  if (first & 4) word[0] = word[2], word[1] = word[3];
  if (first & 2) word[0] = word[1];
  if (first & 1) word[0] >>= 16;
  return lanes;
}

// Divisions of 64 bits take several times as long.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b, bool narrow) {
  return narrow ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

// Lanes of elements i to i + kWidth - 1, whose masks are those of their channels.
template <int kWidth>
__device__ __forceinline__ RandomLanes channel_lanes(const DropoutArgs& a, int64_t i,
                                                     const RandomState& random) {
  const bool last = a.mask.kind == DropoutMask::channels_last,
             narrow = BRAZE_HOOK(narrow, a.numel <= INT32_MAX);
  const int64_t length = BRAZE_HOOK(length_is_channels, last) ? a.mask.channels : a.mask.spatial;
  int64_t row = divide(i, length, narrow), within = i - row * length;
  int64_t start =
      last ? divide(row, BRAZE_HOOK(first_spatial, a.mask.spatial), narrow) * a.mask.channels : row;
  uint64_t held = UINT64_MAX;
  RandomLanes lanes = {}, block = {};
#pragma unroll 1
  for (int j = 0; j < kWidth; ++j) {
    const auto index =
        static_cast<uint64_t>(BRAZE_HOOK(index_within, last) ? start + within : start);
    if (BRAZE_HOOK(other_block, index / kLanesPerBlock != held)) {
      held = index / kLanesPerBlock;
      block = block_lanes(random, held);
    }
    // The lane comes in at the end; those before it move down by one.
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t next =
          w < 3 ? lanes.word[w + 1]
                : lanes_from(block, BRAZE_HOOK(lane_of_channel, index % kLanesPerBlock)).lane(0);
      lanes.word[w] = lanes.word[w] >> 16 | next << 16;
    }
    if (++within == BRAZE_HOOK(run_end, length)) {
      within = 0;
      ++row;
      BRAZE_HOOK(next_start,
                 start = last ? divide(row, a.mask.spatial, narrow) * a.mask.channels : row);
    }
  }
  return lanes_from(lanes, kLanesPerBlock - kWidth);
}

template <DropoutStep kStep, Activation kA, class T>
__device__ __forceinline__ T drop_element(bool kept, T x, T second, const DropoutTerms<T>& terms,
                                          T parameter) {
  if constexpr (kStep == DropoutStep::scale) {
    return drop(kept, x, terms);
  } else if constexpr (kStep == DropoutStep::add) {
    return drop_and_add(kept, x, second, terms.scale);
  } else if constexpr (kStep == DropoutStep::activate) {
    return activate_and_drop<kA>(kept, x, parameter, terms.scale);
  } else if constexpr (kA == Activation::relu) {
    return relu_and_drop_grad(x, second, terms.scale);
  } else {
    return activate_and_drop_grad<kA>(kept, x, second, parameter, terms.scale);
  }
}

template <DropoutStep kStep>
constexpr bool kActivates = kStep == DropoutStep::activate || kStep == DropoutStep::activate_grad;

// `count` accesses, the first of which is at element `begin`, by all threads in turn.
template <class S, class Access, DropoutStep kStep, bool kChannels>
__device__ __forceinline__ void drop_accesses(const DropoutArgs& a, int64_t begin, int count,
                                              const RandomState& random) {
  using T = Arithmetic<S>;
  constexpr bool kTwo = kStep == DropoutStep::add || kStep == DropoutStep::activate_grad;
  constexpr int kCount = Access::kCount, kAtOnce = kTwo ? 1 : 2;  // two loads of a thread
  const DropoutTerms<T> terms = round_terms<T>(a.terms);
  const T parameter = static_cast<T>(a.parameter);
#pragma unroll 1
  for (int v = static_cast<int>(threadIdx.x); v < count; v += kAtOnce * kDropoutThreads) {
    typename Access::Pack x[kAtOnce] = {}, second[kAtOnce] = {};
    RandomLanes lanes[kAtOnce] = {};
    const auto place = [&](int k) { return begin + (v + k * kDropoutThreads) * kCount; };
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (v + k * kDropoutThreads >= BRAZE_HOOK(loaded, count)) continue;
      x[k] = Access::load(a.x, kDTypeOf<S>, place(k));
      if constexpr (kTwo) second[k] = Access::load(a.second, kDTypeOf<S>, place(k));
    }
    // Of ReLU's gradient the output tells.
    if (BRAZE_HOOK(needs_mask, kStep != DropoutStep::activate_grad || a.needs_mask())) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if constexpr (kChannels) {
          lanes[k] = channel_lanes<kCount>(a, place(k), random);
        } else {
          const auto index = static_cast<uint64_t>(place(k));
          const uint64_t first = index % kLanesPerBlock / kCount * kCount;
          lanes[k] = lanes_from(block_lanes(random, index / kLanesPerBlock),
                                BRAZE_HOOK(first_lane, first));
        }
      }
    }
    const auto compute = [&](auto activation) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          Access::set(x[k], j,
                      drop_element<kStep, decltype(activation)::value, T>(
                          is_kept(lanes[k].lane(BRAZE_HOOK(lane, j)), a.threshold),
                          Access::get(x[k], j), Access::get(second[k], j), terms, parameter));
        }
      }
    };
    if constexpr (kActivates<kStep>) {
      with_activation(a.activation, compute);
    } else {
      compute(std::integral_constant<Activation, Activation::identity>());
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (v + k * kDropoutThreads >= BRAZE_HOOK(stored, count)) continue;
      Access::store(a.out, kDTypeOf<S>, place(k), x[k]);
    }
  }
}

// Activations of double need more registers than four blocks of a multiprocessor leave.
template <class S, DropoutStep kStep, bool kChannels>
__global__ void __launch_bounds__(kDropoutThreads, sizeof(S) == 8 && kActivates<kStep> ? 2 : 4)
    dropout_kernel(BRAZE_GRID_CONSTANT(DropoutArgs) a) {
  using Wide = Uniform<S, Arithmetic<S>>;
  const RandomState random = a.random.read();
  const int64_t begin = BRAZE_HOOK(chunk_begin, int64_t{blockIdx.x} * kDropoutChunk);
  if (BRAZE_HOOK(stores_used, a.used != nullptr && begin == 0 && threadIdx.x == 0)) {
    a.used[0] = static_cast<int64_t>(random.seed);
    a.used[1] = static_cast<int64_t>(random.offset);
  }
  const uint64_t addresses = reinterpret_cast<uint64_t>(a.x) |
                             BRAZE_HOOK(out_address, reinterpret_cast<uint64_t>(a.out)) |
                             reinterpret_cast<uint64_t>(a.second);
  const bool aligned = BRAZE_HOOK(misalignment, addresses % 16) == 0;
  const int size = static_cast<int>(min(a.numel - begin, kDropoutChunk));
  const int vectors = aligned ? BRAZE_HOOK(vectors, size / Wide::kCount) : 0;
  const int singles = size - vectors * Wide::kCount;
  drop_accesses<S, Wide, kStep, kChannels>(a, begin, vectors, random);
  drop_accesses<S, Single<Arithmetic<S>>, kStep, kChannels>(a, begin + vectors * Wide::kCount,
                                                            BRAZE_HOOK(singles, singles), random);
}

}  // namespace braze::cuda
