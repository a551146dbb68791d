// math/batch_norm.h against long double, over blocks of data as kernels sum them.
//   batch_norm_program [wrong]   lines "what worst_error where"; wrong: all are spoiled
#include <algorithm>
#include <cstdint>
#include <vector>

#include "exact.h"
#include "math/batch_norm.h"

using namespace braze;
using exact::Worst;

namespace {

double spoiled = 0;

double spoil(double value) { return value * (1 + spoiled) + spoiled; }

// Numbers between -1 and 1, the same everywhere.
class Numbers {
 public:
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<int64_t>(state_) >> 11) * 0x1p-52;
  }

 private:
  uint64_t state_ = 1;
};

struct Data {
  double mean, sigma;
  std::vector<float> x;
};

Data make(double mean, double sigma, int count) {
  Numbers numbers;
  Data data{mean, sigma, {}};
  for (int i = 0; i < count; ++i)
    data.x.push_back(static_cast<float>(mean + sigma * 1.7320508 * numbers.next()));
  return data;
}

// A block as kernels make it: sums in float of what is left after the shift.
Moments block(const float* x, int count, float shift) {
  float sum = 0, square = 0;
  for (int i = 0; i < count; ++i) {
    const float d = x[i] - shift;
    sum += d;
    square = fused_multiply_add(d, d, square);
  }
  return {shift, static_cast<double>(count), sum, square};
}

struct Exact {
  long double mean = 0, variance = 0;
};

Exact exact_of(const std::vector<float>& x) {
  Exact e;
  for (const float v : x) e.mean += v;
  e.mean /= x.size();
  for (const float v : x) e.variance += (v - e.mean) * (v - e.mean);
  e.variance /= x.size();
  return e;
}

enum class Order { forward, backward, tree };

Moments merge_all(std::vector<Moments> blocks, Order order) {
  if (order == Order::backward) blocks = {blocks.rbegin(), blocks.rend()};
  if (order != Order::tree) {
    Moments total;
    for (const Moments& m : blocks) merge_moments(total, m);
    return total;
  }
  while (blocks.size() > 1) {
    std::vector<Moments> half;
    for (size_t i = 0; i < blocks.size(); i += 2) {
      half.push_back(blocks[i]);
      if (i + 1 < blocks.size()) merge_moments(half.back(), blocks[i + 1]);
    }
    blocks = half;
  }
  return blocks[0];
}

// Shifts as they come in practice: the mean's neighbourhood, each block its own, or a stale one.
void statistics() {
  Worst mean("mean_in_sigmas"), variance("variance_relative"), unbiased("unbiased_relative");
  Worst pairs("processes_variance_relative");
  for (const auto& [m, s] : {std::pair{0.0, 1.0}, {30.0, 1.0}, {-1e4, 1e-2}, {1e-3, 1e-6}}) {
    const Data data = make(m, s, 40 * 256 + 17);
    const Exact want = exact_of(data.x);
    for (const Order order : {Order::forward, Order::backward, Order::tree}) {
      for (const bool own_shift : {false, true}) {
        std::vector<Moments> blocks = {Moments()};  // an empty one changes nothing
        for (size_t i = 0; i < data.x.size(); i += 256) {
          const int count = static_cast<int>(std::min<size_t>(256, data.x.size() - i));
          blocks.push_back(block(&data.x[i], count, data.x[own_shift ? i : 0]));
        }
        blocks.push_back(Moments());
        const ChannelMoments got = channel_moments(merge_all(blocks, order));
        mean.see(m, spoil(got.mean), want.mean, sqrtl(want.variance));
        variance.see(m, spoil(variance_of(got)), want.variance, want.variance);
        const double n = static_cast<double>(data.x.size());
        unbiased.see(m, spoil(unbiased_variance_of(got)), want.variance * (n / (n - 1)),
                     want.variance);
        // Three processes of unequal shares.
        Moments all;
        for (size_t part = 0; part < 3; ++part) {
          const auto from = blocks.begin() + static_cast<int64_t>(blocks.size() * part / 4);
          const auto to =
              part == 2 ? blocks.end()
                        : blocks.begin() + static_cast<int64_t>(blocks.size() * (part + 1) / 4);
          const std::vector<Moments> own(from, to);
          merge_moments(all, moments_of(channel_moments(merge_all(own, order))));
        }
        pairs.see(m, spoil(variance_of(channel_moments(all))), want.variance, want.variance);
      }
    }
  }
}

void special_moments() {
  Worst worst("special");
  const float same[300] = {};
  float seven[300], huge[300];
  for (int i = 0; i < 300; ++i) seven[i] = 7.3f, huge[i] = (i % 2 ? 1 : -1) * 1e17f;
  worst.see(0, spoil(variance_of(channel_moments(block(same, 300, 0)))), 0, 1e-12L);
  worst.see(1, spoil(variance_of(channel_moments(block(seven, 300, 7.3f)))), 0, 1e-12L);
  worst.see(2, spoil(variance_of(channel_moments(Moments()))), 0, 1e-12L);
  worst.see(3, spoil(variance_of(channel_moments(block(huge, 300, huge[0])))), 1e34L,
            1e34L * 1e-5L);
  // A constant channel far from its shift: rounding must not give a negative variance.
  const ChannelMoments constant = channel_moments(block(seven, 300, 7.1f));
  worst.see(4, constant.m2 >= 0 ? spoil(0) : -1, 0, 1e-12L);
  huge[17] = NAN;
  worst.see(5, std::isnan(variance_of(channel_moments(block(huge, 300, 0)))) ? 0 : 1, 0, 1e-12L);
  worst.see(6, spoil(update_running(2.0, 10, 0)), 2, 1e-12L);
  worst.see(7, spoil(update_running(2.0, 10, 1)), 10, 1e-12L);
  worst.see(8, spoil(update_running(2.0, 10, 0.1)), 2.8L, 1e-12L);
}

// z and dx of a whole channel from the rounded numbers that kernels use.
template <class T>
void channel(const char* suffix, long double unit) {
  Worst z(std::string("z") + suffix), dx(std::string("dx") + suffix),
      frozen(std::string("frozen_dx") + suffix);
  for (const auto& [m, s] : {std::pair{0.0, 1.0}, {30.0, 1.0}, {-1e4, 1e-2}}) {
    const Data data = make(m, s, 4000);
    const Exact e = exact_of(data.x);
    const double eps = 1e-5, weight = -1.5, bias = 0.75, n = 4000;
    Moments blocks;
    for (int i = 0; i < 4000; i += 250) merge_moments(blocks, block(&data.x[i], 250, data.x[0]));
    const ChannelMoments got = channel_moments(blocks);
    const BatchNormStats<T> stats = make_stats<T>(got.mean, variance_of(got), eps, weight, bias);
    const long double invstd = 1 / sqrtl(e.variance + eps);
    Numbers numbers;
    std::vector<double> d;
    double grad = 0, rounded_input = 0;
    long double sum = 0, product = 0;
    for (const float x : data.x) {
      d.push_back(numbers.next());
      grad += d.back();
      rounded_input += d.back() * static_cast<double>(static_cast<T>(x) - stats.mean);
      sum += d.back();
      product += d.back() * (x - e.mean);
      z.see(m, spoil(normalize<T>(x, stats.mean, stats.scale, stats.shift)),
            (x - e.mean) * invstd * weight + bias, unit);
    }
    const BatchNormSums sums = make_sums(grad, rounded_input, stats.mean_low);
    const BatchNormCoefficients<T> c = make_coefficients<T>(sums, n, stats);
    for (size_t i = 0; i < data.x.size(); ++i) {
      const long double centred = data.x[i] - e.mean;
      const T got_dx = static_cast<T>(d[i]) * c.on_grad +
                       (static_cast<T>(data.x[i]) - stats.mean) * c.on_input + c.constant;
      const long double scale = weight * invstd;
      const long double want = scale * (d[i] - sum / n - centred * invstd * invstd * (product / n));
      dx.see(m, spoil(got_dx), want, unit * fabsl(scale));
      frozen.see(m, spoil(static_cast<T>(d[i]) * stats.scale), d[i] * scale, unit * fabsl(scale));
    }
  }
}

void infinite_mean() {
  Worst worst("infinite_mean");
  const BatchNormStats<float> stats = make_stats<float>(INFINITY, 1, 1e-5, 1, 0);
  worst.see(0, std::isinf(stats.mean) && stats.mean_low == 0 ? spoil(0) : 1, 0, 1e-12L);
}

}  // namespace

int main(int argc, char**) {
  spoiled = argc > 1 ? 0x1p-12 : 0;
  statistics();
  special_moments();
  channel<float>("_float", 0x1p-24L);
  channel<double>("_double", 1e-6L);
  infinite_mean();
  return 0;
}
