// Batch normalisation's second pass: y = activation(z1 [+ z2 | + residual]), 16 bytes at a time.
#pragma once
#include "../math/hook.h"
#include "batch_norm_units.cuh"

namespace braze::cuda {

struct ApplyArgument {
  ApplyArgs args;
  NormGrid grid;
};

// A mask needs all eight elements of its byte in one thread, whatever their size.
template <class S, class Mode>
constexpr int kApplyLanes = Mode::kMask ? 8 : kVector<S>;

template <class S, int kInputs, class Mode>
__global__ void __launch_bounds__(kNormThreads, (blocks_at_once<kInputs, Mode>(!Mode::kMask)))
    batch_norm_apply_kernel(BRAZE_GRID_CONSTANT(ApplyArgument) a) {
  using T = Arithmetic<S>;
  constexpr int kLanes = kApplyLanes<S, Mode>;
  constexpr bool kCurved = std::is_same_v<Mode, AnyCurved>;
  constexpr int kUnroll = kCurved || kLanes > 2 * kVector<S>     ? 1
                          : kInputs == 1 && kLanes == kVector<S> ? 4
                                                                 : 2;
  using Elements = Pack<S, kLanes>;
  const T parameter = static_cast<T>(a.args.parameter);
  // From the end: what the pass before read last may be in the cache still.
  const uint32_t block = gridDim.x - 1 - blockIdx.x;
  Walk<S, kLanes, true, Mode::kPlain> walk(a.grid, block);
  if (walk.left() <= 0) return;
  Normalizer<T, kLanes> normalizer[kInputs];
  const Channels<kLanes> channels(a.grid, block);
#pragma unroll
  for (int k = 0; k < kInputs; ++k) normalizer[k].load(a.args.input[k].stats, a.grid, channels);
  const bool has_residual = BRAZE_HOOK(has_residual, kInputs == 1 && a.args.residual != nullptr);
  for_units<kUnroll>(walk, [&](auto whole, bool) {
    Unit units[kUnroll];
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
