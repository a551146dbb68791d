#include "convolution.h"

#include <cmath>

#include "math/batch_norm.h"

namespace convolution {

using namespace harness;
using norm::ChannelSums, norm::gaussian, norm::near, norm::near_sum, norm::rounding,
    norm::sum_error;

namespace {

// x rounded to the dtype.
double rounded(DType dtype, float x) {
  return with_dtype(dtype, [&](auto storage) {
    to_storage(x, storage);
    return static_cast<double>(from_storage(storage));
  });
}

// The least number above zero.
double least(DType dtype) {
  return dtype == DType::f32 ? 0x1p-149 : dtype == DType::f16 ? 0x1p-24 : 0x1p-133;
}

norm::Spec norm_before(const Spec& s) {
  norm::Spec result{.n = s.n, .c = s.c, .spatial = s.h * s.w, .dtype = s.dtype};
  result.activation = s.activation;
  result.parameter = s.parameter;
  result.mean = s.mean;
  result.sigma = s.sigma;
  result.salt = 2 * s.salt;
  return result;
}

norm::Spec norm_after(const Spec& s) {
  const ConvShape shape = s.shape();
  norm::Spec result{.n = s.n, .c = s.k, .spatial = shape.out_h * shape.out_w, .dtype = s.dtype};
  result.salt = 2 * s.salt + 1;
  return result;
}

norm::Spec with_options(norm::Spec to, const Spec& s) {
  to.weight = s.weight;
  to.bias = s.bias;
  to.running = s.running;
  to.narrow_params = s.narrow_params;
  to.cumulative = s.cumulative;
  return to;
}

// Waits; false if it fails.
template <class Args>
bool launch(cudaError_t (*function)(const Args&, const cuda::NormScratch&, cudaStream_t),
            const Args& args) {
  const norm::Memory memory = memory_for(args);
  if (!CHECK_OK(function(args, memory.scratch, nullptr))) return false;
  CHECK_OK(cudaDeviceSynchronize());
  memory.check();
  return true;
}

}  // namespace

ConvShape Spec::shape() const {
  ConvShape s{n, h, w, c, 0, 0, k, kernel, stride, padding, dtype};
  s.out_h = (h + 2 * padding - kernel) / stride + 1;
  s.out_w = (w + 2 * padding - kernel) / stride + 1;
  return s;
}

const char* describe(const Spec& s) {
  static char text[200];
  snprintf(text, sizeof(text),
           "%lldx%lldx%lldx%lld to %lld, %dx%d stride %d pad %d %s norm %d act %d after %d f32 %d "
           "options %d%d%d%d%d salt %llu",
           static_cast<long long>(s.n), static_cast<long long>(s.h), static_cast<long long>(s.w),
           static_cast<long long>(s.c), static_cast<long long>(s.k), s.kernel, s.kernel, s.stride,
           s.padding, s.dtype == DType::bf16 ? "bf16" : "f16", s.normalised,
           static_cast<int>(s.activation), s.after_norm, s.f32_result, s.weight, s.bias, s.running,
           s.narrow_params, s.cumulative, static_cast<unsigned long long>(s.salt));
  return text;
}

Problem::Problem(const Spec& s)
    : spec(s),
      shape(s.shape()),
      before(with_options(norm_before(s), s)),
      after(with_options(norm_after(s), s)),
      weight(s.dtype, s.k * shape.taps() * s.c),
      weight_grad(s.f32_result ? DType::f32 : s.dtype, weight.count()) {
  Random random(seed() * 1000033 + s.salt);
  for (int64_t i = 0; i < weight.count(); ++i) {
    weight.set(i, s.weight_mean + 0.5 * gaussian(random));
  }
  for (int64_t i = 0; i < after.dy.count(); ++i) {
    after.dy.set(i, s.grad_sigma * (0.1 + gaussian(random)));
  }
  before.set_stats();
  after.set_stats();
  Array& coefficients = after.coefficients[0];
  for (int64_t i = 0; i < coefficients.count(); ++i) {
    coefficients.set(i, (i < kOnInput * s.k ? 1 : 0) + 0.3 * gaussian(random));
  }
}

ConvInput Problem::input() const {
  ConvInput result;
  result.x = before.x[0].data();
  if (spec.normalised) {
    result.stats = before.stats[0].data();
    result.activation = spec.activation;
    result.parameter = spec.parameter;
  }
  return result;
}

ConvOutputGradient Problem::gradient() const {
  ConvOutputGradient result;
  result.d = after.dy.data();
  if (spec.after_norm) {
    result.x = after.x[0].data();
    result.stats = after.stats[0].data();
    result.coefficients = after.coefficients[0].data();
  }
  return result;
}

ConvForwardArgs Problem::forward_args() {
  ConvForwardArgs args;
  args.shape = shape;
  args.input = input();
  args.weight = weight.data();
  args.output = after.x[0].data();
  args.channels = after.channels(0);
  args.stats = after.stats[0].data();
  return args;
}

ConvInputGradArgs Problem::input_grad_args() {
  ConvInputGradArgs args;
  args.shape = shape;
  args.grad = gradient();
  args.weight = weight.data();
  if (spec.normalised) {
    args.input = input();
    args.norm = before.backward_args().grad[0];
    args.norm.dx = nullptr;
  }
  args.result = before.dx[0].data();
  return args;
}

ConvWeightGradArgs Problem::weight_grad_args() {
  ConvWeightGradArgs args;
  args.shape = shape;
  args.input = input();
  args.grad = gradient();
  args.result = weight_grad.data();
  args.result_dtype = weight_grad.dtype();
  return args;
}

std::vector<double> Problem::input_values() const {
  std::vector<double> values;
  for (int64_t i = 0; i < before.x[0].count(); ++i) {
    if (!spec.normalised) {
      values.push_back(before.x[0].get(i));
      continue;
    }
    const auto z = static_cast<float>(before.z(i, i % spec.c));
    const float y = with_activation(spec.activation, [&](auto a) {
      return braze::activate<decltype(a)::value>(z, static_cast<float>(spec.parameter));
    });
    values.push_back(rounded(spec.dtype, y));
  }
  return values;
}

std::vector<double> Problem::gradient_values() const {
  std::vector<double> values;
  for (int64_t i = 0; i < after.dy.count(); ++i) {
    if (!spec.after_norm) {
      values.push_back(after.dy.get(i));
      continue;
    }
    const auto number = [](const Array& array, int64_t at) {
      return static_cast<float>(array.get(at));
    };
    const auto of_channel = [&](const Array& array, int row) {
      return number(array, row * spec.k + i % spec.k);
    };
    const Array& coefficients = after.coefficients[0];
    values.push_back(rounded(
        spec.dtype,
        input_gradient(number(after.dy, i), number(after.x[0], i),
                       of_channel(after.stats[0], kMean), of_channel(coefficients, kOnGrad),
                       of_channel(coefficients, kOnInput), of_channel(coefficients, kConstant))));
  }
  return values;
}

template <class Body>
void Problem::for_each_tap(Body&& body) const {
  int64_t output = 0;
  for (int64_t image = 0; image < shape.n; ++image) {
    for (int64_t y = 0; y < shape.out_h; ++y) {
      for (int64_t x = 0; x < shape.out_w; ++x, ++output) {
        for (int64_t tap = 0; tap < shape.taps(); ++tap) {
          const int64_t row = y * spec.stride - spec.padding + tap / spec.kernel;
          const int64_t column = x * spec.stride - spec.padding + tap % spec.kernel;
          const bool within = row >= 0 && row < spec.h && column >= 0 && column < spec.w;
          body(output, within ? (image * spec.h + row) * spec.w + column : -1, tap);
        }
      }
    }
  }
}

// Sums of fp32 in any order, rounded once.
bool Problem::check_sums(const std::vector<Sum>& sums, const Array& got, int line) const {
  const double unit = 1.001 * rounding(got.dtype()), half_of_least = least(got.dtype()) / 2;
  for (size_t i = 0; i < sums.size(); ++i) {
    const double want = sums[i].value, value = got.get(static_cast<int64_t>(i));
    const double tolerance =
        unit * std::fabs(want) + half_of_least + sums[i].error + 0x1p-20 * sums[i].size + 0x1p-142;
    if (near(value, want, tolerance)) continue;
    char text[120];
    snprintf(text, sizeof(text), "element %zu is %g instead of %g +- %g", i, value, want,
             tolerance);
    failed(__FILE__, line, text);
    return false;
  }
  return true;
}

bool Problem::check_forward() {
  const std::vector<double> in = input_values();
  after.x[0] = Array(spec.dtype, after.x[0].count());
  const norm::Running running = after.running(0);
  if (!launch(cuda::conv_forward, forward_args())) return false;

  std::vector<double> weights;
  for (int64_t i = 0; i < weight.count(); ++i) weights.push_back(weight.get(i));
  std::vector<Sum> sums(static_cast<size_t>(after.x[0].count()));
  for_each_tap([&](int64_t output, int64_t pixel, int64_t tap) {
    for (int64_t k = 0; k < spec.k && pixel >= 0; ++k) {
      Sum& sum = sums[static_cast<size_t>(output * spec.k + k)];
      const double* const a = &in[static_cast<size_t>(pixel * spec.c)];
      const double* const b = &weights[static_cast<size_t>((k * shape.taps() + tap) * spec.c)];
      for (int64_t c = 0; c < spec.c; ++c) {
        sum.value += a[c] * b[c];
        sum.size += std::fabs(a[c] * b[c]);
      }
    }
  });
  if (!check_sums(sums, after.x[0], __LINE__)) return false;
  for (int64_t i = 0; i < after.x[0].count(); ++i) {
    // Every channel of this pixel is.
    if (!std::isfinite(after.x[0].get(i))) {
      return CHECK(std::isnan(after.stats[0].get(kInvstd * spec.k)));
    }
  }
  after.measure(0);
  return after.check_stats(0, running);
}

bool Problem::check_input_grad() {
  const std::vector<double> gradients = gradient_values();
  Array& result = before.dx[0];
  if (!launch(cuda::conv_input_grad, input_grad_args())) return false;

  std::vector<double> weights;
  for (int64_t i = 0; i < weight.count(); ++i) weights.push_back(weight.get(i));
  std::vector<Sum> sums(static_cast<size_t>(result.count()));
  for_each_tap([&](int64_t output, int64_t pixel, int64_t tap) {
    for (int64_t k = 0; k < spec.k && pixel >= 0; ++k) {
      const double gradient = gradients[static_cast<size_t>(output * spec.k + k)];
      const double* const b = &weights[static_cast<size_t>((k * shape.taps() + tap) * spec.c)];
      Sum* const to = &sums[static_cast<size_t>(pixel * spec.c)];
      for (int64_t c = 0; c < spec.c; ++c) {
        to[c].value += gradient * b[c];
        to[c].size += std::fabs(gradient * b[c]);
      }
    }
  });
  if (!spec.normalised) return check_sums(sums, result, __LINE__);

  std::vector<double> d, d_size;
  for (size_t i = 0; i < sums.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    const double slope = before.slope_of(before.is_upper(at, at % spec.c));
    if (slope == 0) {
      sums[i] = {};
    } else if (slope != 1) {
      const double error = rounding(spec.dtype) * std::fabs(sums[i].value) + least(spec.dtype) / 2;
      sums[i] = {sums[i].value * slope, sums[i].size * slope, error * slope};
    }
    d.push_back(result.get(at));
    d_size.push_back(std::fabs(d.back()));
  }
  if (!check_sums(sums, result, __LINE__)) return false;
  const std::vector<ChannelSums> all = before.sums_of(0, d, d_size);
  return before.check_gradients(0, all) && check_coefficients(all);
}

bool Problem::check_coefficients(const std::vector<ChannelSums>& all) const {
  const auto count = static_cast<double>(spec.n * spec.h * spec.w);
  const double unit = sum_error(spec.dtype), last = rounding(DType::f32);
  for (int64_t c = 0; c < spec.c && count > 0; ++c) {
    const ChannelSums& s = all[static_cast<size_t>(c)];
    const auto stat = [&](int row) { return before.stats[0].get(row * spec.c + c); };
    const auto got = [&](int row) { return before.coefficients[0].get(row * spec.c + c); };
    const double scale = stat(kScale), low = stat(kMeanLow);
    const double on_grad_input = -scale * stat(kInvstd) * stat(kInvstd) / count;
    const double on_input = on_grad_input * s.grad_input;
    const double error = unit * std::fabs(on_grad_input) * s.input_size;
    const double constant = -on_input * low - scale * s.grad / count;
    const double constant_error =
        error * std::fabs(low) + unit * std::fabs(scale) * s.grad_size / count;
    if (!CHECK(got(kOnGrad) == scale) ||
        !CHECK(near_sum(got(kOnInput), on_input, last * std::fabs(on_input) + error)) ||
        !CHECK(near_sum(got(kConstant), constant, last * std::fabs(constant) + constant_error))) {
      return false;
    }
  }
  return true;
}

bool Problem::check_weight_grad() {
  const std::vector<double> in = input_values(), gradients = gradient_values();
  // Padding is multiplied, too, and makes a NaN of a gradient that is not finite, as in torch.
  const std::vector<double> zeros(static_cast<size_t>(spec.c));
  if (!launch(cuda::conv_weight_grad, weight_grad_args())) return false;

  std::vector<Sum> sums(static_cast<size_t>(weight.count()));
  for_each_tap([&](int64_t output, int64_t pixel, int64_t tap) {
    for (int64_t k = 0; k < spec.k; ++k) {
      const double gradient = gradients[static_cast<size_t>(output * spec.k + k)];
      const double* const a = pixel < 0 ? zeros.data() : &in[static_cast<size_t>(pixel * spec.c)];
      Sum* const to = &sums[static_cast<size_t>((k * shape.taps() + tap) * spec.c)];
      for (int64_t c = 0; c < spec.c; ++c) {
        to[c].value += gradient * a[c];
        to[c].size += std::fabs(gradient * a[c]);
      }
    }
  });
  return check_sums(sums, weight_grad, __LINE__);
}

bool Problem::check_all() {
  const Case note("%s", describe(spec));
  return check_weight_grad() && check_input_grad() && check_forward();
}

std::vector<char> Problem::results() const {
  std::vector<char> all;
  for (const Array* array :
       {&after.x[0], &after.stats[0], &after.running_mean[0], &after.running_var[0],
        &after.tracked[0], &before.dx[0], &before.coefficients[0], &before.grad_weight[0],
        &before.grad_bias[0], &weight_grad}) {
    const std::vector<char> bytes = array->bytes();
    all.insert(all.end(), bytes.begin(), bytes.end());
  }
  return all;
}

}  // namespace convolution
