// What is done once per channel: merging parts, statistics, coefficients. Once per instruction set.
#pragma once
#include "batch_norm_loops.h"

namespace braze::cpu::BRAZE_SET {
namespace {

using Doubles = Vec<double>;

template <class N>
Doubles load_vector(const void* in, DType dtype, int64_t c, N n, double missing) {
  if (in == nullptr) return missing;
  return with_dtype(dtype, [&](auto element) {
    return Doubles::load(static_cast<const decltype(element)*>(in) + c, n);
  });
}

template <class N>
void store_vector(const Doubles& value, int64_t c, N n, void* out, DType dtype) {
  if (out == nullptr) return;
  with_dtype(dtype,
             [&](auto element) { value.store(static_cast<decltype(element)*>(out) + c, n); });
}

// Row `row` of an array T[rows][c].
template <class T, class N>
Doubles load_row(const void* array, int64_t row, int64_t c, int64_t channel, N n) {
  return Doubles::load(static_cast<const T*>(array) + row * c + channel, n);
}
template <class T, class N>
void store_row(const Doubles& value, void* array, int64_t row, int64_t c, int64_t channel, N n) {
  value.store(static_cast<T*>(array) + row * c + channel, n);
}

// The stats of channels from their mean and biased variance.
template <class T, class N>
void store_stats(const BatchNormChannels& channels, int64_t c, int64_t j, N n, const Doubles& mean,
                 const Doubles& variance, void* stats) {
  const auto s = make_stats_in_double<T>(
      mean, variance, channels.eps, load_vector(channels.weight, channels.param_dtype, j, n, 1),
      load_vector(channels.bias, channels.param_dtype, j, n, 0));
  store_row<T>(s.mean, stats, kMean, c, j, n);
  store_row<T>(s.mean_low, stats, kMeanLow, c, j, n);
  store_row<T>(s.invstd, stats, kInvstd, c, j, n);
  store_row<T>(s.scale, stats, kScale, c, j, n);
  store_row<T>(s.shift, stats, kShift, c, j, n);
}

// channels.momentum is the factor to use: counting up and `cumulative` are the caller's business.
template <class T, class N>
void store_training_stats(const BatchNormChannels& channels, int64_t c, int64_t j, N n,
                          const ChannelMomentsOf<Doubles>& moments, void* stats) {
  store_stats<T>(channels, c, j, n, moments.mean, variance_of(moments), stats);
  if (channels.running_mean == nullptr || moments.count == 0) return;
  const auto update = [&](void* running, double missing, const Doubles& value) {
    const Doubles old = load_vector(running, channels.running_dtype, j, n, missing);
    store_vector(update_running(old, value, channels.momentum), j, n, running,
                 channels.running_dtype);
  };
  update(channels.running_mean, 0, moments.mean);
  update(channels.running_var, 1, unbiased_variance_of(moments));
}

template <class T>
void finish_statistics_of(const StatisticsArgs& a, const Geometry& g, const double* parts,
                          int64_t begin, int64_t end) {
  const int64_t c = g.shape.c;
  each_vector<Doubles>(end - begin, [&](int64_t j, auto n) {
    j += begin;
    MomentsOf<Doubles> all = {};
    for (int64_t p = 0; p < g.parts; ++p) {
      const double* part = parts + p * kPartRows * g.row() + j;
      merge_moments(
          all, {Doubles::load(part + kPartShift * g.row(), n), static_cast<double>(g.part_count(p)),
                Doubles::load(part + kPartSum * g.row(), n),
                Doubles::load(part + kPartSquare * g.row(), n)});
    }
    const ChannelMomentsOf<Doubles> merged = channel_moments(all);
    if (a.moments == nullptr) {
      store_training_stats<T>(a.channels, c, j, n, merged, a.stats);
      return;
    }
    store_row<T>(merged.mean, a.moments, kMomentsMean, c, j, n);
    store_row<T>(merged.m2, a.moments, kMomentsM2, c, j, n);
    store_row<T>(merged.count, a.moments, kMomentsCount, c, j, n);
  });
}

template <class T>
void combine_of(const CombineArgs& a) {
  const int64_t c = a.shape.c;
  each_vector<Doubles>(c, [&](int64_t j, auto n) {
    MomentsOf<Doubles> all = {};
    for (int64_t p = 0; p < a.processes; ++p) {
      const T* m = static_cast<const T*>(a.moments) + p * kMomentsRows * c;
      merge_moments(all, moments_of<Doubles>({load_row<T>(m, kMomentsMean, c, j, n),
                                              load_row<T>(m, kMomentsM2, c, j, n),
                                              static_cast<double>(m[kMomentsCount * c + j])}));
    }
    store_training_stats<T>(a.channels, c, j, n, channel_moments(all), a.stats);
  });
}

template <class T>
void from_running_of(const FromRunningArgs& a) {
  const BatchNormChannels& b = a.channels;
  each_vector<Doubles>(a.shape.c, [&](int64_t j, auto n) {
    store_stats<T>(b, a.shape.c, j, n, load_vector(b.running_mean, b.running_dtype, j, n, 0),
                   load_vector(b.running_var, b.running_dtype, j, n, 1), a.stats);
  });
}

template <class T, class N>
void store_coefficients(const BatchNormCoefficients<Doubles>& k, int64_t c, int64_t j, N n,
                        void* coefficients) {
  store_row<T>(k.on_grad, coefficients, kOnGrad, c, j, n);
  store_row<T>(k.on_input, coefficients, kOnInput, c, j, n);
  store_row<T>(k.constant, coefficients, kConstant, c, j, n);
}

template <class T, class N>
BatchNormCoefficients<Doubles> training_coefficients(const BatchNormSumsOf<Doubles>& sums,
                                                     double count, const void* stats, int64_t c,
                                                     int64_t j, N n) {
  return make_coefficients_in_double(sums, count, load_row<T>(stats, kScale, c, j, n),
                                     load_row<T>(stats, kInvstd, c, j, n),
                                     load_row<T>(stats, kMeanLow, c, j, n));
}

// `parts` is null where no sums are wanted.
template <class T>
void finish_reduce_of(const BackwardArgs& a, const Geometry& g, const double* parts, int64_t begin,
                      int64_t end) {
  const int64_t c = g.shape.c;
  each_vector<Doubles>(end - begin, [&](int64_t j, auto n) {
    j += begin;
    const auto sum = [&](int64_t row) {
      Doubles all = 0;
      for (int64_t p = 0; parts != nullptr && p < g.parts; ++p) {
        all += Doubles::load(parts + (p * kPartRows + row) * g.row() + j, n);
      }
      return all;
    };
    const Doubles grad = sum(kPartGrad);
    for (int side = 0; side < 2; ++side) {
      const void* stats = a.input[side].stats;
      const InputGradient& out = a.grad[side];
      if (a.input[side].x == nullptr) continue;
      const auto sums = make_sums(grad, sum(side == 0 ? kPartInput : kPartInput2),
                                  load_row<T>(stats, kMeanLow, c, j, n));
      store_vector(weight_gradient(sums, load_row<T>(stats, kInvstd, c, j, n)), j, n,
                   out.grad_weight, out.param_dtype);
      store_vector(sums.grad, j, n, out.grad_bias, out.param_dtype);
      if (side == 0 && a.sums != nullptr) {
        store_row<T>(sums.grad, a.sums, 0, c, j, n);
        store_row<T>(sums.grad_input, a.sums, 1, c, j, n);
      }
      if (out.coefficients == nullptr) continue;
      const BatchNormCoefficients<Doubles> frozen = {load_row<T>(stats, kScale, c, j, n), 0, 0};
      store_coefficients<T>(
          a.batch_statistics ? training_coefficients<T>(sums, a.count, stats, c, j, n) : frozen, c,
          j, n, out.coefficients);
    }
  });
}

template <class T>
void coefficients_of(const CoefficientsArgs& a) {
  const int64_t c = a.shape.c;
  const double count = static_cast<double>(*static_cast<const T*>(a.count));
  each_vector<Doubles>(c, [&](int64_t j, auto n) {
    const BatchNormSumsOf<Doubles> sums = {load_row<T>(a.sums, 0, c, j, n),
                                           load_row<T>(a.sums, 1, c, j, n)};
    store_coefficients<T>(training_coefficients<T>(sums, count, a.stats, c, j, n), c, j, n,
                          a.coefficients);
  });
}

// body(number) of the type that channels of `dtype` are computed in.
template <class Body>
void with_arithmetic(DType dtype, const Body& body) {
  dtype == DType::f64 ? body(double{}) : body(float{});
}

}  // namespace
}  // namespace braze::cpu::BRAZE_SET
