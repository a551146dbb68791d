// Batch normalisation backward: d = (dy [+ dy2]) * activation'(z) is summed per channel in one pass
// and made into the inputs' gradients in the next. Formulas: math/batch_norm.h.
#pragma once
#include "../math/hook.h"
#include "batch_norm_units.cuh"

namespace braze::cuda {

// Sums over one channel, for merge_rows: of d, and of d (x - mean) for each input.
template <int kInputs>
struct SumsItem {
  static constexpr int kNumbers = 1 + kInputs;
  double number[kNumbers];

  __device__ __forceinline__ void merge(const SumsItem& other) {
#pragma unroll
    for (int k = 0; k < kNumbers; ++k) number[k] += other.number[k];
  }
};

struct BackwardArgument {
  BackwardArgs args;
  NormGrid grid;
  double* partials;       // [groups][splits][width] items; reduce's alone
  unsigned int* tickets;  // norm_tickets(grid), zero; reduce's alone
  double upper, lower;    // the two derivatives, where there are two
  bool recompute;         // z decides on the derivative
  bool reads_x;           // apply_grad's alone; reduce does anyway
};

// What a unit needs in both passes.
template <class S, int kInputs, class Mode>
struct BackwardUnit {
  using T = Arithmetic<S>;
  static constexpr int kLanes = kVector<S>;
  using Elements = Pack<S, kLanes>;
  Unit<Mode::kPlain> place;
  Elements x[kInputs], dy, dy2, residual;
  uint32_t mask;

  // What may be absent is in registers all the same, and zeros there.
  __device__ __forceinline__ void load(const BackwardArgument& a, bool reads_x) {
    const BackwardArgs& args = a.args;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) x[k].load(args.input[k].x, place, reads_x);
    dy.load(args.dy, place);
    dy2.load(args.dy2, place, BRAZE_HOOK(has_dy2, args.dy2 != nullptr));
    if constexpr (!Mode::kPlain) {
      residual.load(
          args.residual, place,
          BRAZE_HOOK(reads_residual, kInputs == 1 && a.recompute && args.residual != nullptr));
    }
    if constexpr (!Mode::kPlain || Mode::kMask) {
      mask = args.mask != nullptr && place.lanes != 0
                 ? args.mask[place.mask] >> BRAZE_HOOK(mask_bit, place.bit)
                 : 0;
    }
  }

  // d of each lane; 0 where dy is, as in lanes that the unit lacks.
  __device__ __forceinline__ void gradient(const BackwardArgument& a,
                                           const Normalizer<T, kLanes> (&normalizer)[kInputs],
                                           T (&d)[kLanes]) const {
    constexpr bool kCurved = std::is_same_v<Mode, AnyCurved>;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) d[j] = dy.get(j);
    if (a.args.dy2 != nullptr) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) d[j] += dy2.get(j);
    }
    T z[kLanes] = {};
    const bool recompute = kCurved || (Mode::kPlain ? std::is_same_v<Mode, PlainRelu>
                                                    : BRAZE_HOOK(recompute, a.recompute));
    if (recompute) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        z[j] = normalizer[0](x[0].get(j), j);
        if constexpr (kInputs == 2) z[j] += normalizer[1](x[1].get(j), j);
      }
      if (!Mode::kPlain && kInputs == 1 && a.args.residual != nullptr) {
#pragma unroll
        for (int j = 0; j < kLanes; ++j) z[j] += residual.get(j);
      }
    }
    const T parameter = static_cast<T>(a.args.parameter);
    const bool masked =
        Mode::kPlain ? Mode::kMask : BRAZE_HOOK(masked, !kCurved && a.args.mask != nullptr);
    if (masked) {
      const T upper = Mode::kPlain ? T(1) : static_cast<T>(a.upper),
              lower = Mode::kPlain ? T(0) : static_cast<T>(a.lower);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        d[j] = two_slope_gradient(d[j], (mask >> j & 1u) != 0, upper, lower);
      }
    } else {
      with_activation_of<Mode>(a.args.activation, [&](auto activation) {
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          d[j] = activation_gradient<decltype(activation)::value>(d[j], z[j], parameter);
        }
      });
    }
  }
};

// Two inputs with eight lanes of four coefficients each take the room of two blocks.
template <class S, int kInputs, class Mode>
constexpr int kGradBlocks = kInputs == 2 && kVector<S> == 8 ? 1 : kBlocksAtOnce<kInputs, Mode>;

// Units at once; more where one block has a multiprocessor to itself.
template <class Mode, int kBlocks>
constexpr int kBackwardUnroll = std::is_same_v<Mode, AnyCurved> ? 1
                                : kBlocks == 1                  ? 3
                                                                : 2;

template <class T>
__device__ __forceinline__ BatchNormStats<T> load_stats(const void* stats, int64_t channels,
                                                        int64_t c) {
  const T* const from = static_cast<const T*>(stats) + c;
  return {from[kMean * channels], from[kMeanLow * channels], from[kInvstd * channels],
          from[kScale * channels], from[kShift * channels]};
}

template <class T>
__device__ __forceinline__ void write_coefficients(void* coefficients, int64_t channels, int64_t c,
                                                   const BatchNormCoefficients<T>& values) {
  T* const to = static_cast<T*>(coefficients) + c;
  to[kOnGrad * channels] = values.on_grad;
  to[kOnInput * channels] = values.on_input;
  to[kConstant * channels] = values.constant;
}

// The k-th input's share of one channel's sums.
template <class T>
__device__ __forceinline__ void finish_input(const BackwardArgs& args, int k, int64_t c,
                                             double grad, double grad_rounded_input) {
  const InputGradient& g = args.grad[k];
  const int64_t channels = args.shape.c;
  const BatchNormStats<T> stats = load_stats<T>(args.input[k].stats, channels, c);
  const BatchNormSums sums = make_sums(grad, grad_rounded_input, stats.mean_low);
  if (BRAZE_HOOK(first_input, k == 0) && args.sums != nullptr) {
    T* const to = static_cast<T*>(args.sums) + c;
    to[0] = static_cast<T>(sums.grad);
    to[channels] = static_cast<T>(sums.grad_input);
  }
  if (g.coefficients != nullptr) {
    write_coefficients(g.coefficients, channels, c,
                       BRAZE_HOOK(batch_coefficients, args.batch_statistics)
                           ? make_coefficients(sums, args.count, stats)
                           : constant_coefficients(stats));
  }
  if (g.grad_weight != nullptr) {
    Single<double>::store(g.grad_weight, g.param_dtype, c, weight_gradient(sums, stats.invstd));
  }
  if (g.grad_bias != nullptr) Single<double>::store(g.grad_bias, g.param_dtype, c, sums.grad);
}

// --- the kernels ---

template <class S, int kInputs, class Mode>
__global__ void __launch_bounds__(kNormThreads, (kBlocksAtOnce<kInputs, Mode>))
    batch_norm_reduce_kernel(BRAZE_GRID_CONSTANT(BackwardArgument) a) {
  using T = Arithmetic<S>;
  using Item = SumsItem<kInputs>;
  constexpr int kLanes = kVector<S>, kUnroll = kBackwardUnroll<Mode, kBlocksAtOnce<kInputs, Mode>>;
  BRAZE_SHARED(double, shared, kMergeNumbers<Item>);
  const NormGrid& grid = a.grid;
  Walk<S, kLanes, false, Mode::kPlain> walk(grid, blockIdx.x);
  T grad[kLanes] = {}, grad_input[kInputs][kLanes] = {};
  if (walk.left() > 0) {
    Normalizer<T, kLanes> normalizer[kInputs];
    const Channels<kLanes> channels(grid, blockIdx.x);
#pragma unroll
    for (int k = 0; k < kInputs; ++k) normalizer[k].load(a.args.input[k].stats, grid, channels);
    for_units<kUnroll>(walk, [&](auto whole, bool) {
      BackwardUnit<S, kInputs, Mode> units[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        units[i].place = walk.template next<decltype(whole)::value>();
        units[i].load(a, true);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        T d[kLanes];
        units[i].gradient(a, normalizer, d);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          T ignored = grad[j];
#pragma unroll
          for (int k = 0; k < kInputs; ++k) {
            add_gradient(d[j], units[i].x[k].get(j), normalizer[k].mean[j],
                         k == 0 ? grad[j] : ignored, grad_input[k][j]);
          }
        }
      }
    });
  }

  const auto sums_of = [&](int lane) {
    Item item;
    item.number[0] = grad[lane];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) item.number[1 + k] = grad_input[k][lane];
    return item;
  };
  const auto item_of = [&](int lane) {
    Item item = sums_of(lane);
    if (BRAZE_HOOK(one_channel, !grid.per_lane)) {
#pragma unroll
      for (int j = 1; j < kLanes; ++j) item.merge(sums_of(j));
    }
    return item;
  };
  const auto finish = [&](int64_t c, const Item& item) {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      finish_input<T>(a.args, k, c, item.number[0], item.number[1 + BRAZE_HOOK(second_sum, k)]);
    }
  };
  reduce_group<Item, kLanes>(grid, group_of(grid, blockIdx.x), split_of(grid, blockIdx.x),
                             reinterpret_cast<Item*>(a.partials), a.tickets, shared, item_of,
                             finish);
}

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_coefficients_kernel(BRAZE_GRID_CONSTANT(CoefficientsArgs) args) {
  const int64_t channels = args.shape.c;
  const int64_t c = int64_t{blockIdx.x} * kNormThreads + threadIdx.x;
  if (c >= channels) return;
  const T* const from = static_cast<const T*>(args.sums) + c;
  const double count = *static_cast<const T*>(args.count);
  write_coefficients(
      args.coefficients, channels, c,
      make_coefficients({static_cast<double>(from[0]), static_cast<double>(from[channels])}, count,
                        load_stats<T>(args.stats, channels, c)));
}

template <class S, int kInputs, class Mode>
__global__ void __launch_bounds__(kNormThreads, (kGradBlocks<S, kInputs, Mode>))
    batch_norm_apply_grad_kernel(BRAZE_GRID_CONSTANT(BackwardArgument) a) {
  using T = Arithmetic<S>;
  constexpr int kLanes = kVector<S>, kUnroll = kBackwardUnroll<Mode, kGradBlocks<S, kInputs, Mode>>;
  // From the end: what reduce read last may be in the cache still.
  const uint32_t block = gridDim.x - 1 - blockIdx.x;
  Walk<S, kLanes, true, Mode::kPlain> walk(a.grid, block);
  if (walk.left() <= 0) return;
  Normalizer<T, kLanes> normalizer[kInputs];
  T on_grad[kInputs][kLanes], on_input[kInputs][kLanes], constant[kInputs][kLanes];
  const Channels<kLanes> channels(a.grid, block);
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    const void* const coefficients = a.args.grad[k].coefficients;
    normalizer[k].load(a.args.input[k].stats, a.grid, channels);
    if (!Mode::kPlain && a.args.grad[k].dx == nullptr) continue;
    channels.load(on_grad[k], coefficients, kOnGrad, a.grid);
    channels.load(on_input[k], coefficients, kOnInput, a.grid);
    channels.load(constant[k], coefficients, kConstant, a.grid);
  }
  for_units<kUnroll>(walk, [&](auto whole, bool) {
    BackwardUnit<S, kInputs, Mode> units[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      units[i].place = walk.template next<decltype(whole)::value>();
      units[i].load(a, Mode::kPlain || a.reads_x);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      T d[kLanes];
      units[i].gradient(a, normalizer, d);
      Pack<S, kLanes> out;
      if (BRAZE_HOOK(wants_residual, kInputs == 1 && a.args.grad_residual != nullptr)) {
        out.clear();
#pragma unroll
        for (int j = 0; j < kLanes; ++j) out.set(j, d[j]);
        out.store(a.args.grad_residual, units[i].place);
      }
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
        if (!Mode::kPlain && a.args.grad[k].dx == nullptr) continue;
        out.clear();
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          out.set(j, Mode::kPlain || BRAZE_HOOK(batch_gradient, a.args.batch_statistics)
                         ? input_gradient(d[j], units[i].x[k].get(j), normalizer[k].mean[j],
                                          on_grad[k][j], on_input[k][j], constant[k][j])
                         : input_gradient(d[j], on_grad[k][j]));
        }
        out.store(a.args.grad[k].dx, units[i].place);
      }
    }
  });
}

}  // namespace braze::cuda
