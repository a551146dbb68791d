// A batch-norm problem in device memory, and its answers in double. Convolutions have one before
// and one after them.
#pragma once
#include <functional>
#include <vector>

#include "cuda/batch_norm_launch.h"
#include "harness.h"

namespace norm {

using namespace braze;

// A vector in device memory. One element past its end is out of bounds.
class Array {
 public:
  Array() = default;
  // `phase` elements beyond a 16-byte boundary; filled with rubbish.
  Array(DType dtype, int64_t count, int phase = 0);
  ~Array();
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept;

  double get(int64_t i) const;
  void set(int64_t i, double value);
  void zero();
  void* data() const { return data_; }
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }
  std::vector<char> bytes() const;

 private:
  char* memory_ = nullptr;
  char* data_ = nullptr;
  int64_t count_ = 0;
  DType dtype_ = DType::f32;
};

struct Spec {
  int64_t n = 2, c = 3, spatial = 5;
  bool channels_last = true;
  DType dtype = DType::f32;
  Activation activation = Activation::identity;
  double parameter = 0.25;
  int inputs = 1;
  bool residual = false, mask = false, dy2 = false;
  bool weight = true, bias = true, running = true;
  bool narrow_params = false;     // parameters of the tensors' dtype, not fp32
  bool training = true;           // else running statistics normalise
  bool in_place = false;          // y is x, dx is dy
  int phase = 0, phase_of_y = 0;  // elements off a 16-byte boundary; phase_of_y: y and dy differ
  double mean = 0.5, sigma = 1, momentum = 0.1, eps = 1e-5;
  bool cumulative = false;
  uint64_t salt = 0;

  ActivationShape shape() const { return {n, c, spatial, channels_last, dtype}; }
};

const char* describe(const Spec& spec);
int64_t offset_of(const Spec& spec, int64_t image, int64_t channel, int64_t pixel);
DType arithmetic(DType dtype);  // f64 or f32
double gaussian(harness::Random& random);
double rounding(DType dtype);  // relative error of one rounding to it
// f(offset, channel) of every element.
template <class F>
void for_each(const Spec& s, F&& f) {
  for (int64_t i = 0; i < s.n; ++i) {
    for (int64_t c = 0; c < s.c; ++c) {
      for (int64_t p = 0; p < s.spatial; ++p) f(offset_of(s, i, c, p), c);
    }
  }
}

// Workspace and tickets of exactly the size asked for.
struct Memory {
  Array workspace, tickets;
  cuda::NormScratch scratch;
  explicit Memory(const cuda::NormScratchSize& size);
  void check() const;  // the tickets are zero again
};
template <class Args>
Memory memory_for(const Args& args) {
  cuda::NormScratchSize size;
  CHECK_OK(cuda::batch_norm_scratch(args, size));
  return Memory(size);
}

// The running statistics of one input, as they were.
struct Running {
  std::vector<double> mean, variance;
};

// Of one channel: of d and d (x - mean), and of their sizes.
struct ChannelSums {
  double grad = 0, grad_input = 0, grad_size = 0, input_size = 0;
};

class Problem {
 public:
  explicit Problem(const Spec& spec);

  BatchNormChannels channels(int k);
  StatisticsArgs statistics_args(int k);
  ApplyArgs apply_args();
  BackwardArgs backward_args();

  // Launch, wait, compare; false if something was wrong.
  bool check_statistics();
  bool apply_running();
  bool check_apply();
  bool check_backward();
  bool check_all();
  // The reference's stats in place of the kernels'.
  void set_stats();
  // Mean and variance of what x is now, for the reference.
  void measure(int k);
  // What a kernel has made of x, and of the running statistics that were.
  Running running(int k) const;
  bool check_stats(int k, const Running& before);
  // In the arithmetic type, from the stats in device memory: a derivative that jumps must see the
  // kernels' own z.
  double z(int64_t i, int64_t channel) const;
  bool is_upper(int64_t i, int64_t channel) const;
  double slope_of(bool high) const;  // the derivative, where there are two or one
  // `d_size`: what d's error is relative to.
  std::vector<ChannelSums> sums_of(int k, const std::vector<double>& d,
                                   const std::vector<double>& d_size) const;
  // What a kernel has made of these sums.
  bool check_gradients(int k, const std::vector<ChannelSums>& sums) const;
  // What everything wrote, for comparing runs.
  std::vector<char> results() const;

  Spec spec;
  Array x[2], residual, y, mask, dy, dy2, dx[2], grad_residual;
  Array weight[2], bias[2], running_mean[2], running_var[2], tracked[2];
  Array stats[2], coefficients[2], grad_weight[2], grad_bias[2], sums;

 private:
  double weight_of(int k, int64_t c) const { return spec.weight ? weight[k].get(c) : 1; }
  double bias_of(int k, int64_t c) const { return spec.bias ? bias[k].get(c) : 0; }
  int64_t channel_of(int64_t i) const {
    return spec.channels_last ? i % spec.c : i / spec.spatial % spec.c;
  }
  double stat(int k, int row, int64_t c) const { return stats[k].get(row * spec.c + c); }
  bool check_running(int k, const Running& before);

  // Of each input and channel, by the reference.
  std::vector<double> mean_[2], variance_[2];
};

double activate(Activation activation, double z, double parameter);
double derivative(Activation activation, double z, double parameter);
// By z in the arithmetic type, as the kernels see it.
bool upper(Activation activation, double z, DType arithmetic);
bool two_slopes(Activation activation);

// Relative to what is summed, of sums and what is made of them.
inline double sum_error(DType dtype) { return dtype == DType::f64 ? 1e-13 : 3e-6; }

// |got - want| <= tolerance, or NaN in both, or the same infinity.
bool near(double got, double want, double tolerance);
// The same of sums over a channel: from an infinity anything may come that is not finite.
bool near_sum(double got, double want, double tolerance);

}  // namespace norm
