// Batch normalisation's second pass: y = activation(z1 [+ z2 | + residual]), 16 bytes at a time.
#pragma once
#include "../math/hook.h"
#include "batch_norm_units.cuh"

namespace braze::cuda {

struct ApplyArgument {
  RunningApplyArgs args;  // without stats to write: an ApplyArgs
  NormGrid grid;
};

// A mask needs all eight elements of its byte in one thread, whatever their size.
template <class S, class Mode>
constexpr int kApplyLanes = Mode::kMask ? 8 : kVector<S>;

// Of layers that normalise with their running statistics: mean, scale and shift of the group's
// channels, per input, in arrays of kMaxWidth. One block of the group writes them to stats.
template <class T, int kInputs>
__device__ __forceinline__ void make_group_stats(const ApplyArgument& a, uint32_t block,
                                                 T* shared) {
  const NormGrid& grid = a.grid;
  const int64_t first = int64_t{group_of(grid, block)} * grid.width;
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    const BatchNormChannels& b = a.args.channels[k];
    T* const to = shared + 3 * k * kMaxWidth;
    for (int i = static_cast<int>(threadIdx.x); i < grid.width; i += static_cast<int>(blockDim.x)) {
      const int64_t c = first + i;
      if (c >= BRAZE_HOOK(running_channels, grid.channels)) break;
      const BatchNormStats<T> s = stats_of<T>(c, load_number(b.running_mean, b.running_dtype, c, 0),
                                              load_number(b.running_var, b.running_dtype, c, 1), b);
      to[i] = s.mean;
      to[kMaxWidth + i] = s.scale;
      to[2 * kMaxWidth + i] = s.shift;
      if (split_of(grid, block) == 0) write_stats(a.args.stats[k], grid.channels, c, s);
    }
  }
}

template <class S, int kInputs, class Mode>
__global__ void __launch_bounds__(kNormThreads, (kBlocksAtOnce<kInputs, Mode>))
    batch_norm_apply_kernel(BRAZE_GRID_CONSTANT(ApplyArgument) a) {
  using T = Arithmetic<S>;
  constexpr int kLanes = kApplyLanes<S, Mode>;
  constexpr bool kCurved = std::is_same_v<Mode, AnyCurved>;
  constexpr int kUnroll = kCurved || kLanes > 2 * kVector<S>     ? 1
                          : kInputs == 1 && kLanes == kVector<S> ? 4
                                                                 : 2;
  using Elements = Pack<S, kLanes>;
  // From the end: what the pass before read last may be in the cache still.
  const uint32_t block = gridDim.x - 1 - blockIdx.x;
  BRAZE_SHARED(T, shared, 3 * kInputs * kMaxWidth);
  const bool from_running = BRAZE_HOOK(from_running, a.args.stats[0] != nullptr);
  if (from_running) {
    make_group_stats<T, kInputs>(a, block, shared);
    __syncthreads();
  }
  Walk<S, kLanes, true, Mode::kPlain> walk(a.grid, block);
  if (walk.left() <= 0) return;
  Normalizer<T, kLanes> normalizer[kInputs];
  const Channels<kLanes> channels(a.grid, block);
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    if (from_running) {
      const T* const of_input = shared + 3 * k * kMaxWidth;
      channels.load(normalizer[k].mean, of_input);
      channels.load(normalizer[k].scale, of_input + kMaxWidth);
      channels.load(normalizer[k].shift, of_input + 2 * kMaxWidth);
    } else {
      normalizer[k].load(a.args.input[k].stats, a.grid, channels);
    }
  }
  const bool has_residual = BRAZE_HOOK(has_residual, kInputs == 1 && a.args.residual != nullptr);
  for_units<kUnroll>(walk, [&](auto whole, bool) {
    Unit<Mode::kPlain> units[kUnroll];
    Elements x[kInputs][kUnroll], residual[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) units[i] = walk.template next<decltype(whole)::value>();
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
      for (int k = 0; k < kInputs; ++k) x[k][i].load(a.args.input[k].x, units[i]);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) residual[i].load(a.args.residual, units[i], has_residual);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      T z[kLanes];
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        z[j] = normalizer[0](x[0][i].get(j), j);
        if constexpr (kInputs == 2) z[j] += normalizer[1](x[1][i].get(j), j);
      }
      if (has_residual) {
#pragma unroll
        for (int j = 0; j < kLanes; ++j) z[j] += residual[i].get(j);
      }
      Elements y;
      y.clear();
      [[maybe_unused]] uint32_t bits = 0;
      with_activation_of<Mode>(a.args.activation, [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
        const T parameter = static_cast<T>(a.args.parameter);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          y.set(j, activate<kActivation>(z[j], parameter));
          if constexpr (Mode::kMask && has_two_slopes(kActivation)) {
            bits |= static_cast<uint32_t>(derivative_is_upper<kActivation>(z[j])) << j;
          }
        }
      });
      y.store(a.args.y, units[i]);
      if constexpr (Mode::kMask) {
        if (units[i].lanes != 0) {
          a.args.mask[units[i].mask] =
              static_cast<uint8_t>(bits & BRAZE_HOOK(mask_lanes, units[i].lanes));
        }
      }
    }
  });
}

}  // namespace braze::cuda
