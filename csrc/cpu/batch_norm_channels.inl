// What is done once per channel: merging parts, statistics, coefficients. Included once per
// instruction set.

#include "batch_norm_segments.inl"

namespace BRAZE_ISA {

constexpr int64_t kGroup = 64;  // channels at a time

template <class S>
BRAZE_TARGET void load_doubles(const void* in, int64_t begin, int64_t n, double* out) {
  const S* p = static_cast<const S*>(in) + begin;
  for (int64_t j = 0; j < n; ++j) out[j] = from_storage(p[j]);
}

BRAZE_TARGET inline void load_vector(const void* in, DType dtype, int64_t begin, int64_t n,
                                     double missing, double* out) {
  if (in == nullptr) {
    for (int64_t j = 0; j < n; ++j) out[j] = missing;
    return;
  }
  with_dtype(dtype, [&](auto element) { load_doubles<decltype(element)>(in, begin, n, out); });
}

template <class S>
BRAZE_TARGET void store_doubles(const double* in, int64_t begin, int64_t n, void* out) {
  S* p = static_cast<S*>(out) + begin;
  for (int64_t j = 0; j < n; ++j) to_storage(static_cast<Arithmetic<S>>(in[j]), p[j]);
}

BRAZE_TARGET inline void store_vector(const double* in, int64_t begin, int64_t n, void* out,
                                      DType dtype) {
  if (out == nullptr) return;
  with_dtype(dtype, [&](auto element) { store_doubles<decltype(element)>(in, begin, n, out); });
}

// The stats of channels [begin, begin + n) from their mean and biased variance.
template <class T>
BRAZE_TARGET void store_stats(const BatchNormChannels& channels, int64_t c, int64_t begin,
                              int64_t n, const double* mean, const double* variance, void* stats) {
  double weight[kGroup], bias[kGroup];
  load_vector(channels.weight, channels.param_dtype, begin, n, 1, weight);
  load_vector(channels.bias, channels.param_dtype, begin, n, 0, bias);
  T* out = static_cast<T*>(stats) + begin;
  for (int64_t j = 0; j < n; ++j) {
    const BatchNormStats<T> s =
        make_stats<T>(mean[j], variance[j], channels.eps, weight[j], bias[j]);
    out[kMean * c + j] = s.mean;
    out[kMeanLow * c + j] = s.mean_low;
    out[kInvstd * c + j] = s.invstd;
    out[kScale * c + j] = s.scale;
    out[kShift * c + j] = s.shift;
  }
}

// channels.momentum is the factor to use: counting up and `cumulative` are the caller's business.
template <class T>
BRAZE_TARGET void store_training_stats(const BatchNormChannels& channels, int64_t c, int64_t begin,
                                       int64_t n, const ChannelMoments* moments, void* stats) {
  double mean[kGroup], variance[kGroup];
  for (int64_t j = 0; j < n; ++j) {
    mean[j] = moments[j].mean;
    variance[j] = variance_of(moments[j]);
  }
  store_stats<T>(channels, c, begin, n, mean, variance, stats);
  if (channels.running_mean == nullptr) return;
  double running_mean[kGroup], running_var[kGroup];
  load_vector(channels.running_mean, channels.running_dtype, begin, n, 0, running_mean);
  load_vector(channels.running_var, channels.running_dtype, begin, n, 1, running_var);
  for (int64_t j = 0; j < n; ++j) {
    if (moments[j].count == 0) continue;
    running_mean[j] = update_running(running_mean[j], mean[j], channels.momentum);
    running_var[j] =
        update_running(running_var[j], unbiased_variance_of(moments[j]), channels.momentum);
  }
  store_vector(running_mean, begin, n, channels.running_mean, channels.running_dtype);
  store_vector(running_var, begin, n, channels.running_var, channels.running_dtype);
}

template <class T>
BRAZE_TARGET void finish_statistics_of(const StatisticsArgs& a, const Geometry& g,
                                       const double* parts, int64_t begin, int64_t end) {
  const int64_t c = g.shape.c;
  for (; begin < end; begin += kGroup) {
    const int64_t n = std::min(kGroup, end - begin);
    double shift[kGroup] = {}, sum[kGroup] = {}, square[kGroup] = {}, count = 0;
    for (int64_t p = 0; p < g.parts; ++p) {
      const double* part = parts + p * kPartRows * g.row() + begin;
      const double part_count = static_cast<double>(g.part_count(p));
      for (int64_t j = 0; j < n; ++j) {
        Moments m = {shift[j], count, sum[j], square[j]};
        merge_moments(m, {part[kPartShift * g.row() + j], part_count, part[kPartSum * g.row() + j],
                          part[kPartSquare * g.row() + j]});
        shift[j] = m.shift;
        sum[j] = m.sum;
        square[j] = m.square;
      }
      count += part_count;
    }
    ChannelMoments merged[kGroup];
    for (int64_t j = 0; j < n; ++j) {
      merged[j] = channel_moments({shift[j], count, sum[j], square[j]});
    }
    if (a.moments == nullptr) {
      store_training_stats<T>(a.channels, c, begin, n, merged, a.stats);
      continue;
    }
    T* out = static_cast<T*>(a.moments) + begin;
    for (int64_t j = 0; j < n; ++j) {
      out[kMomentsMean * c + j] = static_cast<T>(merged[j].mean);
      out[kMomentsM2 * c + j] = static_cast<T>(merged[j].m2);
      out[kMomentsCount * c + j] = static_cast<T>(merged[j].count);
    }
  }
}

template <class T>
BRAZE_TARGET void combine_of(const CombineArgs& a) {
  const int64_t c = a.shape.c;
  for (int64_t begin = 0; begin < c; begin += kGroup) {
    const int64_t n = std::min(kGroup, c - begin);
    ChannelMoments merged[kGroup];
    for (int64_t j = 0; j < n; ++j) {
      Moments total;
      for (int64_t p = 0; p < a.processes; ++p) {
        const T* m = static_cast<const T*>(a.moments) + p * kMomentsRows * c + begin + j;
        merge_moments(total, moments_of({static_cast<double>(m[kMomentsMean * c]),
                                         static_cast<double>(m[kMomentsM2 * c]),
                                         static_cast<double>(m[kMomentsCount * c])}));
      }
      merged[j] = channel_moments(total);
    }
    store_training_stats<T>(a.channels, c, begin, n, merged, a.stats);
  }
}

template <class T>
BRAZE_TARGET void from_running_of(const FromRunningArgs& a) {
  for (int64_t begin = 0; begin < a.shape.c; begin += kGroup) {
    const int64_t n = std::min(kGroup, a.shape.c - begin);
    double mean[kGroup], variance[kGroup];
    load_vector(a.channels.running_mean, a.channels.running_dtype, begin, n, 0, mean);
    load_vector(a.channels.running_var, a.channels.running_dtype, begin, n, 1, variance);
    store_stats<T>(a.channels, a.shape.c, begin, n, mean, variance, a.stats);
  }
}

template <class T>
BRAZE_TARGET inline void store_coefficients(const BatchNormCoefficients<T>& k, int64_t c,
                                            int64_t channel, void* coefficients) {
  T* out = static_cast<T*>(coefficients) + channel;
  out[kOnGrad * c] = k.on_grad;
  out[kOnInput * c] = k.on_input;
  out[kConstant * c] = k.constant;
}

template <class T>
BRAZE_TARGET inline BatchNormStats<T> stats_of(const void* stats, int64_t c, int64_t channel) {
  const T* s = static_cast<const T*>(stats) + channel;
  return {s[kMean * c], s[kMeanLow * c], s[kInvstd * c], s[kScale * c], s[kShift * c]};
}

// `parts` is null where no sums are wanted.
template <class T>
BRAZE_TARGET void finish_reduce_of(const BackwardArgs& a, const Geometry& g, const double* parts,
                                   int64_t begin, int64_t end) {
  const int64_t c = g.shape.c;
  for (; begin < end; begin += kGroup) {
    const int64_t n = std::min(kGroup, end - begin);
    double grad[kGroup] = {}, grad_input[2][kGroup] = {};
    for (int64_t p = 0; parts != nullptr && p < g.parts; ++p) {
      const double* part = parts + p * kPartRows * g.row() + begin;
      for (int64_t j = 0; j < n; ++j) grad[j] += part[kPartGrad * g.row() + j];
      for (int64_t j = 0; j < n; ++j) grad_input[0][j] += part[kPartInput * g.row() + j];
      if (a.input[1].x == nullptr) continue;
      for (int64_t j = 0; j < n; ++j) grad_input[1][j] += part[kPartInput2 * g.row() + j];
    }
    for (int side = 0; side < 2; ++side) {
      if (a.input[side].x == nullptr) continue;
      const InputGradient& out = a.grad[side];
      double grad_weight[kGroup], grad_bias[kGroup];
      for (int64_t j = 0; j < n; ++j) {
        const BatchNormStats<T> stats = stats_of<T>(a.input[side].stats, c, begin + j);
        const BatchNormSums sums =
            make_sums(grad[j], grad_input[side][j], static_cast<double>(stats.mean_low));
        grad_weight[j] = weight_gradient(sums, static_cast<double>(stats.invstd));
        grad_bias[j] = sums.grad;
        if (side == 0 && a.sums != nullptr) {
          static_cast<T*>(a.sums)[begin + j] = static_cast<T>(sums.grad);
          static_cast<T*>(a.sums)[c + begin + j] = static_cast<T>(sums.grad_input);
        }
        if (out.coefficients == nullptr) continue;
        const BatchNormCoefficients<T> frozen = {stats.scale, T(0), T(0)};
        store_coefficients(a.batch_statistics ? make_coefficients(sums, a.count, stats) : frozen, c,
                           begin + j, out.coefficients);
      }
      store_vector(grad_weight, begin, n, out.grad_weight, out.param_dtype);
      store_vector(grad_bias, begin, n, out.grad_bias, out.param_dtype);
    }
  }
}

template <class T>
BRAZE_TARGET void coefficients_of(const CoefficientsArgs& a) {
  const int64_t c = a.shape.c;
  const T* sums = static_cast<const T*>(a.sums);
  const double count = static_cast<double>(*static_cast<const T*>(a.count));
  for (int64_t j = 0; j < c; ++j) {
    const BatchNormSums s = {static_cast<double>(sums[j]), static_cast<double>(sums[c + j])};
    store_coefficients(make_coefficients(s, count, stats_of<T>(a.stats, c, j)), c, j,
                       a.coefficients);
  }
}

}  // namespace BRAZE_ISA
