// Dropout: one block per chunk of memory. A warp takes a tile of 256 elements at a time; each lane
// makes the random numbers of eight neighbours, and the lanes trade the eight bits that come of
// them, so that every access of the warp is one stretch of memory in every dtype.
#pragma once
#include <type_traits>

#include "../math/hook.h"
#include "../plan/dropout.h"
#include "dropout_launch.h"
#include "elements.cuh"

namespace braze::cuda {

constexpr unsigned kDropoutThreads = 256;
constexpr int kDropoutWarps = kDropoutThreads / 32;
constexpr int kTileElements = 32 * kLanesPerBlock;
constexpr int kTilesPerChunk = static_cast<int>(kDropoutChunk) / kTileElements;
static_assert(kTilesPerChunk % kDropoutWarps == 0);

// Which of the eight mask indices of a block are kept, as bits.
__device__ __forceinline__ uint32_t kept_bits(const RandomState& random, uint64_t block,
                                              uint32_t threshold) {
  const RandomLanes lanes =
      random_lanes(BRAZE_HOOK(seed, random.seed), BRAZE_HOOK(offset, random.offset),
                   BRAZE_HOOK(random_block, block));
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kLanesPerBlock; ++k) {
    bits |= is_kept(lanes.lane(BRAZE_HOOK(lane, k)), threshold) ? 1u << k : 0u;
  }
  return bits;
}

// Divisions of 64 bits take several times as long.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b, bool narrow) {
  return narrow ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

// Bits of elements i to i + kWidth - 1, whose masks are those of their channels.
template <int kWidth>
__device__ __forceinline__ uint32_t channel_bits(const DropoutArgs& a, int64_t i,
                                                 const RandomState& random) {
  const bool last = a.mask.kind == DropoutMask::channels_last,
             narrow = BRAZE_HOOK(narrow, a.numel <= INT32_MAX);
  const int64_t length = BRAZE_HOOK(length_is_channels, last) ? a.mask.channels : a.mask.spatial;
  int64_t row = divide(i, length, narrow), within = i - row * length;
  int64_t start =
      last ? divide(row, BRAZE_HOOK(first_spatial, a.mask.spatial), narrow) * a.mask.channels : row;
  int64_t held = -1;
  uint32_t bits = 0, block_bits = 0;
#pragma unroll 1
  for (int j = 0; j < kWidth; ++j) {
    const int64_t index = BRAZE_HOOK(index_within, last) ? start + within : start;
    if (BRAZE_HOOK(other_block, index / kLanesPerBlock != held)) {
      held = index / kLanesPerBlock;
      block_bits = kept_bits(random, static_cast<uint64_t>(held), a.threshold);
    }
    bits |= (block_bits >> BRAZE_HOOK(lane_of_channel, index % kLanesPerBlock) & 1u) << j;
    if (++within == BRAZE_HOOK(run_end, length)) {
      within = 0;
      ++row;
      BRAZE_HOOK(next_start,
                 start = last ? divide(row, a.mask.spatial, narrow) * a.mask.channels : row);
    }
  }
  return bits;
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

// Where a lane has element j of its eight of a tile, in accesses of kWidth elements.
template <int kWidth>
__device__ __forceinline__ int place_in_tile(int j) {
  return (j / kWidth * 32 + static_cast<int>(threadIdx.x % 32)) * kWidth + j % kWidth;
}

// A bit for each of this lane's eight elements of the tile that begins with element `base`.
template <int kWidth, bool kChannels>
__device__ __forceinline__ uint32_t tile_bits(const DropoutArgs& a, int64_t base,
                                              const RandomState& random) {
  uint32_t bits = 0;
  if constexpr (kChannels) {
#pragma unroll 1
    for (int j = 0; j < kLanesPerBlock; j += kWidth) {
      bits |= channel_bits<kWidth>(a, base + place_in_tile<kWidth>(j), random) << j;
    }
  } else {
    const uint64_t block =
        BRAZE_HOOK(tile_block, static_cast<uint64_t>(base) / kLanesPerBlock) + threadIdx.x % 32;
    const uint32_t own = kept_bits(random, block, a.threshold);
    if constexpr (kWidth == kLanesPerBlock) {
      bits = own;
    } else {
#pragma unroll
      for (int j = 0; j < kLanesPerBlock; j += kWidth) {
        const int place = place_in_tile<kWidth>(j);
        const uint32_t theirs =
            __shfl_sync(0xffffffffu, own, BRAZE_HOOK(owner, place / kLanesPerBlock));
        bits |= (theirs >> BRAZE_HOOK(bit_of_owner, place % kLanesPerBlock) &
                 BRAZE_HOOK(bits_wanted, (1u << kWidth) - 1))
                << j;
      }
    }
  }
  return bits;
}

// kWidth elements per access: 16 bytes, or one, which may lie beyond the end.
template <class S, int kWidth, DropoutStep kStep, Activation kA>
__device__ __forceinline__ void drop_tile(const DropoutArgs& a, int64_t base, uint32_t bits) {
  using T = Arithmetic<S>;
  using Access = std::conditional_t<kWidth == 1, Single<T>, Uniform<S, T>>;
  constexpr bool kTwo = kStep == DropoutStep::add || kStep == DropoutStep::activate_grad;
  constexpr int kAccesses = kLanesPerBlock / kWidth;
  constexpr int kAtOnce = kWidth == 1 ? 1 : kAccesses;  // accesses under way
  const DropoutTerms<T> terms = round_terms<T>(a.terms);
  const T parameter = static_cast<T>(a.parameter);
#pragma unroll 1
  for (int first = 0; first < kAccesses; first += kAtOnce) {
    typename Access::Pack x[kAtOnce] = {}, second[kAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = base + place_in_tile<kWidth>((first + k) * kWidth);
      if (BRAZE_HOOK(beyond_input, kWidth == 1 && i >= a.numel)) continue;
      x[k] = Access::load(a.x, kDTypeOf<S>, i);
      if constexpr (kTwo) second[k] = Access::load(a.second, kDTypeOf<S>, i);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = base + place_in_tile<kWidth>((first + k) * kWidth);
      if (BRAZE_HOOK(beyond_output, kWidth == 1 && i >= a.numel)) continue;
      const uint32_t kept = bits >> (BRAZE_HOOK(first_access, first) + k) * kWidth;
      typename Access::Pack result = x[k];
#pragma unroll
      for (int j = 0; j < Access::kCount; ++j) {
        T other = T(0);
        if constexpr (kTwo) other = Access::get(second[k], j);
        Access::set(result, j,
                    drop_element<kStep, kA, T>((kept >> BRAZE_HOOK(element_bit, j) & 1u) != 0,
                                               Access::get(x[k], j), other, terms, parameter));
      }
      Access::store(a.out, kDTypeOf<S>, i, result);
    }
  }
}

// Of one multiprocessor: activations of double need more registers than four blocks leave.
template <class S>
constexpr int blocks_at_once(DropoutStep step) {
  const bool activates = step == DropoutStep::activate || step == DropoutStep::activate_grad;
  if (sizeof(S) == 8 && activates) return 2;
  return sizeof(S) == 4 && step == DropoutStep::activate_grad ? 3 : 4;
}

template <class S, DropoutStep kStep, bool kChannels>
__global__ void __launch_bounds__(kDropoutThreads, blocks_at_once<S>(kStep))
    dropout_kernel(BRAZE_GRID_CONSTANT(DropoutArgs) a) {
  constexpr bool kActivates = kStep == DropoutStep::activate || kStep == DropoutStep::activate_grad;
  constexpr int kWidth = 16 / sizeof(S);
  const RandomState random = a.random.read();
  const auto chunk = static_cast<int64_t>(blockIdx.x);
  if (BRAZE_HOOK(stores_used, a.used != nullptr && chunk == 0 && threadIdx.x == 0)) {
    a.used[0] = static_cast<int64_t>(random.seed);
    a.used[1] = static_cast<int64_t>(random.offset);
  }
  const uint64_t addresses = reinterpret_cast<uint64_t>(a.x) |
                             BRAZE_HOOK(out_address, reinterpret_cast<uint64_t>(a.out)) |
                             reinterpret_cast<uint64_t>(a.second);
  const bool aligned = BRAZE_HOOK(misalignment, addresses % 16) == 0;
  const int warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll 1
  for (int tile = warp; tile < BRAZE_HOOK(tiles, kTilesPerChunk); tile += kDropoutWarps) {
    const int64_t base = BRAZE_HOOK(chunk_begin, chunk * kDropoutChunk) + tile * kTileElements;
    if (base >= a.numel) break;
    const bool wide = aligned && base + BRAZE_HOOK(tile_elements, kTileElements) <= a.numel;
    uint32_t bits = 0;
    if (BRAZE_HOOK(needs_mask, a.needs_mask())) {
      bits = wide ? tile_bits<kWidth, kChannels>(a, base, random)
                  : tile_bits<1, kChannels>(a, base, random);
    }
    const auto run = [&](auto activation) {
      constexpr Activation kA = decltype(activation)::value;
      if (wide) {
        drop_tile<S, kWidth, kStep, kA>(a, base, bits);
      } else {
        drop_tile<S, 1, kStep, kA>(a, base, bits);
      }
    };
    if constexpr (kActivates) {
      with_activation(a.activation, run);
    } else {
      run(std::integral_constant<Activation, Activation::identity>());
    }
  }
}

}  // namespace braze::cuda
