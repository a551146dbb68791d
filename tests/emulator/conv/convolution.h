// A convolution between two batch norms in device memory, and its answers in double.
#pragma once
#include "../batch_norm/norm.h"
#include "cuda/conv_launch.h"

namespace convolution {

using namespace braze;
using norm::Array;

struct Spec {
  int64_t n = 2, h = 5, w = 6, c = 8, k = 8;
  int kernel = 1, stride = 1, padding = 0;
  DType dtype = DType::bf16;
  bool normalised = true;  // the input comes through a batch norm and an activation
  Activation activation = Activation::relu;
  double parameter = 0.01;
  bool after_norm = true;   // the gradient goes through the batch norm that follows
  bool f32_result = false;  // of the weight's gradient
  bool weight = true, bias = true, running = true, narrow_params = false,
       cumulative = false;  // of the batch norms
  double mean = 0.5, sigma = 1, weight_mean = 0, grad_sigma = 1;
  uint64_t salt = 0;

  ConvShape shape() const;
};

const char* describe(const Spec& spec);

// Workspace and tickets of exactly the size asked for.
template <class Args>
norm::Memory memory_for(const Args& args) {
  cuda::NormScratchSize size;
  CHECK_OK(cuda::conv_scratch(args, size));
  return norm::Memory(size);
}

class Problem {
 public:
  explicit Problem(const Spec& spec);

  ConvForwardArgs forward_args();
  ConvInputGradArgs input_grad_args();
  ConvWeightGradArgs weight_grad_args();

  // Launch, wait, compare; false if something was wrong. The output takes the place of what the
  // gradients have gone by.
  bool check_forward();
  bool check_input_grad();
  bool check_weight_grad();
  bool check_all();
  // What everything wrote, for comparing runs.
  std::vector<char> results() const;

  Spec spec;
  ConvShape shape;
  // x[0] of `before` is the input and dx[0] its gradient, x[0] of `after` the output and dy the
  // gradient that comes back.
  norm::Problem before, after;
  Array weight, weight_grad;

 private:
  struct Sum {
    double value = 0, size = 0;  // size: of the terms
    double error = 0;            // of an earlier rounding
  };

  ConvInput input() const;
  ConvOutputGradient gradient() const;
  // What is multiplied: exact, as everything that is rounded to the dtype is.
  std::vector<double> input_values() const;
  std::vector<double> gradient_values() const;
  // body(output pixel, input pixel, tap); the input pixel is -1 where a tap is in the padding.
  template <class Body>
  void for_each_tap(Body&& body) const;
  bool check_sums(const std::vector<Sum>& sums, const Array& got, int line) const;
  bool check_coefficients(const std::vector<norm::ChannelSums>& sums) const;
};

}  // namespace convolution
