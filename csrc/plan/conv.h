// A convolution between two batch norms, as kernels get it: pointers, sizes and flags, no torch.
// What the batch norm before it would have written is made where it is read, and what the one after
// it would have read again is summed where it is made.
//
//   forward      input, weight -> output, stats of the batch norm that follows
//   input_grad   gradient of the output, weight -> gradient of the input, or, through the batch
//   norm
//                before, its d with what reduce makes of it
//   weight_grad  input, gradient of the output -> gradient of the weight
#pragma once
#include <cstdint>

#include "batch_norm.h"

namespace braze {

// Activations are [n][h][w][c] in memory, weights [k][kernel][kernel][c]. Channels are multiples of
// 8, kernels are 1x1 or 3x3, strides 1 or 2, the dtype bf16 or f16.
struct ConvShape {
  int64_t n = 0, h = 0, w = 0, c = 0;   // of the input
  int64_t out_h = 0, out_w = 0, k = 0;  // of the output
  int32_t kernel = 1, stride = 1, padding = 0;
  DType dtype = DType::bf16;

  BRAZE_INLINE ActivationShape input() const { return {n, c, h * w, true, dtype}; }
  BRAZE_INLINE ActivationShape output() const { return {n, k, out_h * out_w, true, dtype}; }
  BRAZE_INLINE int64_t taps() const { return int64_t{kernel} * kernel; }
};

// Whether an activation is cheap enough to be computed wherever it is read.
BRAZE_INLINE constexpr bool is_recomputed(Activation a) {
  return a == Activation::identity || a == Activation::relu || a == Activation::relu6 ||
         a == Activation::leaky_relu;
}

// The tensor x, or, with stats, activation(normalised x) rounded to its dtype; padding is zero
// either way.
struct ConvInput {
  const void* x = nullptr;
  const void* stats = nullptr;  // float[kStatsRows][c]; null: none
  Activation activation = Activation::identity;
  double parameter = 0;
};

// The gradient d of a convolution's output, or, with coefficients, d on_grad + (x - mean) on_input
// + constant rounded to its dtype, where x is that output and d the gradient after its batch norm.
struct ConvOutputGradient {
  const void* d = nullptr;
  const void* x = nullptr;
  const void* stats = nullptr;         // float[kStatsRows][k]
  const void* coefficients = nullptr;  // float[kCoefficientRows][k]; null: none
};

struct ConvForwardArgs {
  ConvShape shape;
  ConvInput input;
  const void* weight = nullptr;
  void* output = nullptr;
  BatchNormChannels channels;  // of the batch norm that follows
  void* stats = nullptr;       // float[kStatsRows][k] of the output, as stored
};

struct ConvInputGradArgs {
  ConvShape shape;
  ConvOutputGradient grad;
  const void* weight = nullptr;
  // With input.stats the gradient, rounded to the dtype, is multiplied by activation'(z) and
  // rounded again; sums of what is stored become what `norm` wants, whose dx is not read.
  ConvInput input;
  InputGradient norm;
  void* result = nullptr;
};

struct ConvWeightGradArgs {
  ConvShape shape;
  ConvInput input;
  ConvOutputGradient grad;
  void* result = nullptr;           // [k][kernel][kernel][c] of result_dtype
  DType result_dtype = DType::f32;  // f32, or the shape's
};

}  // namespace braze
