#include <cmath>

#include "math/batch_norm.h"
#include "norm.h"

namespace norm {

using namespace harness;

Problem::Problem(const Spec& s) : spec(s) {
  Random random(seed() * 1000003 + s.salt);
  const int64_t numel = s.n * s.c * s.spatial;
  const DType type = arithmetic(s.dtype);
  const DType params = s.narrow_params ? s.dtype : type;
  const auto activations = [&](Array& array, int phase, double mean, double sigma) {
    array = Array(s.dtype, numel, phase);
    for (int64_t i = 0; i < numel; ++i) array.set(i, mean + sigma * gaussian(random));
  };
  const auto parameters = [&](Array& array, double around) {
    array = Array(params, s.c);
    for (int64_t i = 0; i < s.c; ++i) array.set(i, around + 0.5 * gaussian(random));
  };
  for (int k = 0; k < s.inputs; ++k) {
    activations(x[k], s.phase, s.mean, s.sigma);
    parameters(weight[k], 1);
    parameters(bias[k], 0);
    parameters(running_mean[k], s.mean);
    parameters(running_var[k], 3);
    for (int64_t c = 0; c < s.c; ++c) running_var[k].set(c, std::fabs(running_var[k].get(c)));
    tracked[k] = Array(DType::f64, 1);
    *static_cast<int64_t*>(tracked[k].data()) = 3;
    stats[k] = Array(type, kStatsRows * s.c);
    coefficients[k] = Array(type, kCoefficientRows * s.c);
    grad_weight[k] = Array(params, s.c);
    grad_bias[k] = Array(params, s.c);
    if (!s.in_place || k > 0) dx[k] = Array(s.dtype, numel, s.phase);
  }
  if (s.residual) activations(residual, s.phase, 0, 1);
  activations(dy, s.phase_of_y, 0.1, 1);
  if (s.dy2) activations(dy2, s.phase_of_y, 0.2, 1);
  if (!s.in_place) y = Array(s.dtype, numel, s.phase_of_y);
  if (s.residual) grad_residual = Array(s.dtype, numel, s.phase);
  mask = Array(DType::f16, (s.shape().mask_bytes() + 1) / 2);
  sums = Array(type, 2 * s.c);
  for (int k = 0; k < s.inputs; ++k) measure(k);
}

void Problem::measure(int k) {
  const auto count = static_cast<double>(spec.n * spec.spatial);
  mean_[k].assign(static_cast<size_t>(spec.c), 0);
  variance_[k].assign(static_cast<size_t>(spec.c), 0);
  if (count == 0) return;
  // By their distance from the first value, which loses nothing.
  const auto first = [&](int64_t c) { return x[k].get(offset_of(spec, 0, c, 0)); };
  for_each(spec, [&](int64_t i, int64_t c) {
    mean_[k][static_cast<size_t>(c)] += x[k].get(i) - first(c);
  });
  for (int64_t c = 0; c < spec.c; ++c) {
    double& mean = mean_[k][static_cast<size_t>(c)];
    mean = first(c) + mean / count;
  }
  for_each(spec, [&](int64_t i, int64_t c) {
    const double d = x[k].get(i) - mean_[k][static_cast<size_t>(c)];
    variance_[k][static_cast<size_t>(c)] += d * d;
  });
  for (double& variance : variance_[k]) variance /= count;
}

BatchNormChannels Problem::channels(int k) {
  BatchNormChannels b;
  if (spec.weight) b.weight = weight[k].data();
  if (spec.bias) b.bias = bias[k].data();
  b.param_dtype = b.running_dtype = weight[k].dtype();
  if (spec.running || !spec.training) {
    b.running_mean = running_mean[k].data();
    b.running_var = running_var[k].data();
    b.batches_tracked = static_cast<int64_t*>(tracked[k].data());
  }
  b.eps = spec.eps;
  b.momentum = spec.momentum;
  b.cumulative = spec.cumulative;
  return b;
}

StatisticsArgs Problem::statistics_args(int k) {
  StatisticsArgs args;
  args.shape = spec.shape();
  args.x = x[k].data();
  args.channels = channels(k);
  args.stats = stats[k].data();
  return args;
}

ApplyArgs Problem::apply_args() {
  ApplyArgs args;
  args.shape = spec.shape();
  for (int k = 0; k < spec.inputs; ++k) args.input[k] = {x[k].data(), stats[k].data()};
  if (spec.residual) args.residual = residual.data();
  args.activation = spec.activation;
  args.parameter = spec.parameter;
  args.y = spec.in_place ? x[0].data() : y.data();
  if (spec.mask) args.mask = static_cast<uint8_t*>(mask.data());
  return args;
}

BackwardArgs Problem::backward_args() {
  BackwardArgs args;
  args.shape = spec.shape();
  args.dy = dy.data();
  if (spec.dy2) args.dy2 = dy2.data();
  for (int k = 0; k < spec.inputs; ++k) {
    args.input[k] = {x[k].data(), stats[k].data()};
    InputGradient& g = args.grad[k];
    if (spec.weight) g.grad_weight = grad_weight[k].data();
    if (spec.bias) g.grad_bias = grad_bias[k].data();
    g.param_dtype = weight[k].dtype();
    g.coefficients = coefficients[k].data();
    g.dx = spec.in_place && k == 0 ? dy.data() : dx[k].data();
  }
  if (spec.residual) {
    args.residual = residual.data();
    args.grad_residual = grad_residual.data();
  }
  if (spec.mask) args.mask = static_cast<const uint8_t*>(mask.data());
  args.activation = spec.activation;
  args.parameter = spec.parameter;
  args.batch_statistics = spec.training;
  args.count = static_cast<double>(spec.n * spec.spatial);
  args.sums = sums.data();
  return args;
}

void Problem::set_stats() {
  for (int k = 0; k < spec.inputs; ++k) {
    for (int64_t c = 0; c < spec.c; ++c) {
      const auto i = static_cast<size_t>(c);
      const double mean = spec.training ? mean_[k][i] : running_mean[k].get(c);
      const double variance = spec.training ? variance_[k][i] : running_var[k].get(c);
      const auto put = [&](const auto& s) {
        stats[k].set(kMean * spec.c + c, s.mean);
        stats[k].set(kMeanLow * spec.c + c, s.mean_low);
        stats[k].set(kInvstd * spec.c + c, s.invstd);
        stats[k].set(kScale * spec.c + c, s.scale);
        stats[k].set(kShift * spec.c + c, s.shift);
      };
      if (spec.dtype == DType::f64) {
        put(make_stats<double>(mean, variance, spec.eps, weight_of(k, c), bias_of(k, c)));
      } else {
        put(make_stats<float>(mean, variance, spec.eps, weight_of(k, c), bias_of(k, c)));
      }
    }
  }
}

double Problem::z(int64_t i, int64_t c) const {
  const auto value = [&](auto zero) {
    using T = decltype(zero);
    const auto number = [&](const Array& array, int64_t j) { return static_cast<T>(array.get(j)); };
    T sum = 0;
    for (int k = 0; k < spec.inputs; ++k) {
      const T one =
          normalize(number(x[k], i), number(stats[k], kMean * spec.c + c),
                    number(stats[k], kScale * spec.c + c), number(stats[k], kShift * spec.c + c));
      sum = k == 0 ? one : sum + one;
    }
    if (spec.residual) sum += number(residual, i);
    return static_cast<double>(sum);
  };
  return spec.dtype == DType::f64 ? value(0.0) : value(0.0f);
}

bool Problem::is_upper(int64_t i, int64_t c) const {
  return upper(spec.activation, z(i, c), arithmetic(spec.dtype));
}

Running Problem::running(int k) const {
  Running now;
  for (int64_t c = 0; c < spec.c; ++c) {
    now.mean.push_back(running_mean[k].get(c));
    now.variance.push_back(running_var[k].get(c));
  }
  return now;
}

bool Problem::check_running(int k, const Running& before) {
  const int64_t batches = *static_cast<const int64_t*>(tracked[k].data());
  if (!CHECK(batches == (spec.running ? 4 : 3))) return false;
  const auto count = static_cast<double>(spec.n * spec.spatial);
  const double momentum = spec.cumulative ? 0.25 : spec.momentum;
  const double unit = rounding(running_mean[k].dtype()) * 1.01 + 1e-6 * momentum;
  for (int64_t c = 0; c < spec.c; ++c) {
    const auto i = static_cast<size_t>(c);
    double mean = before.mean[i], variance = before.variance[i];
    if (spec.running && count > 0) {
      mean += momentum * (mean_[k][i] - mean);
      variance += momentum * (variance_[k][i] * count / (count - 1) - variance);
    }
    if (!CHECK(near(running_mean[k].get(c), mean, unit * (std::fabs(mean) + spec.sigma))) ||
        !CHECK(near(running_var[k].get(c), variance, unit * variance))) {
      return false;
    }
  }
  return true;
}

bool Problem::check_stats(int k, const Running& before) {
  const bool wide = spec.dtype == DType::f64;
  const double unit = wide ? 1e-13 : 1e-6, rounded = rounding(arithmetic(spec.dtype)) * 2.5;
  for (int64_t c = 0; c < spec.c; ++c) {
    const auto i = static_cast<size_t>(c);
    const double sigma = std::sqrt(variance_[k][i]);
    const double mean = stat(k, kMean, c) + stat(k, kMeanLow, c);
    const double invstd = 1 / std::sqrt(variance_[k][i] + spec.eps);
    const double scale = invstd * weight_of(k, c);
    const double far = std::fabs(mean_[k][i]) * 3e-16;
    // Half of the variance's error of 1e-6.
    if (!CHECK(near(mean, mean_[k][i], unit * sigma + far)) ||
        !CHECK(near(stat(k, kInvstd, c), invstd, (unit / 2 + rounded) * invstd)) ||
        !CHECK(near(stat(k, kScale, c), scale, (unit / 2 + rounded) * std::fabs(scale)))) {
      return false;
    }
    const double low = stat(k, kMeanLow, c) * scale, bias = bias_of(k, c);
    if (!CHECK(near(stat(k, kShift, c), bias - low,
                    rounded * std::fabs(bias - low) + unit * std::fabs(low)))) {
      return false;
    }
  }
  return check_running(k, before);
}

std::vector<ChannelSums> Problem::sums_of(int k, const std::vector<double>& d,
                                          const std::vector<double>& d_size) const {
  std::vector<ChannelSums> result(static_cast<size_t>(spec.c));
  for (size_t i = 0; i < d.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    const int64_t c = channel_of(at);
    ChannelSums& s = result[static_cast<size_t>(c)];
    const double distance = x[k].get(at) - (stat(k, kMean, c) + stat(k, kMeanLow, c));
    s.grad += d[i];
    s.grad_input += d[i] * distance;
    s.grad_size += d_size[i];
    s.input_size += d_size[i] * std::fabs(distance);
  }
  return result;
}

bool Problem::check_gradients(int k, const std::vector<ChannelSums>& all) const {
  const double unit = sum_error(spec.dtype);
  for (int64_t c = 0; c < spec.c; ++c) {
    const ChannelSums& s = all[static_cast<size_t>(c)];
    const double invstd = stat(k, kInvstd, c), rounded = rounding(grad_bias[k].dtype());
    if (spec.bias && !CHECK(near_sum(grad_bias[k].get(c), s.grad,
                                     unit * s.grad_size + rounded * std::fabs(s.grad) + 6e-8))) {
      return false;
    }
    const double wanted = s.grad_input * invstd;
    if (spec.weight &&
        !CHECK(near_sum(grad_weight[k].get(c), wanted,
                        unit * s.input_size * invstd + rounded * std::fabs(wanted) + 6e-8))) {
      return false;
    }
  }
  return true;
}

// At a place in the middle of either piece.
double Problem::slope_of(bool high) const {
  return derivative(spec.activation, high ? 0.5 : -10, spec.parameter);
}

}  // namespace norm
