// Convolutions that take the batch norm before them along, and the statistics of the one after, as
// torch operators; what they compute is in plan/conv.h. Images are bf16 or fp16, channels last in
// memory or made so, `conv_weight` [K, C, r, r] with r of 1 or 3, strides 1 or 2, C and K multiples
// of 8.
//
// `input` is an image, or, with `input_stats` (kStatsRows rows of fp32), what a batch norm with
// `activation` makes of it. A gradient `grad` is an image, or, with `grad_input`, `grad_stats` and
// `coefficients`, what the batch norm of `grad_input` makes of it.
#pragma once
#include "batch_norm.h"

namespace braze {

// The convolution's output, and the statistics of the batch norm that follows.
std::tuple<at::Tensor, at::Tensor> conv_norm_forward(const at::Tensor& input,
                                                     const OptionalTensor& input_stats,
                                                     int64_t activation, double parameter,
                                                     const at::Tensor& conv_weight, int64_t stride,
                                                     int64_t padding, BRAZE_NORM_PARAMETERS());

// The gradient of the input, or, with `input_stats`, its d before the batch norm, the coefficients
// that make the input's gradient of it, and the gradients of the batch norm's weight and bias, in
// the dtype of `input_weight`. The last three are empty otherwise.
using ConvInputGradResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ConvInputGradResult conv_norm_input_grad(
    const at::Tensor& grad, const OptionalTensor& grad_input, const OptionalTensor& grad_stats,
    const OptionalTensor& coefficients, const at::Tensor& conv_weight, const OptionalTensor& input,
    const OptionalTensor& input_stats, const OptionalTensor& input_weight, int64_t activation,
    double parameter, at::IntArrayRef input_size, int64_t stride, int64_t padding);

// The gradient of the convolution's weight, channels last in memory: in fp32 if `wide`, else in the
// input's dtype.
at::Tensor conv_norm_weight_grad(const at::Tensor& input, const OptionalTensor& input_stats,
                                 int64_t activation, double parameter, const at::Tensor& grad,
                                 const OptionalTensor& grad_input, const OptionalTensor& grad_stats,
                                 const OptionalTensor& coefficients, int64_t kernel, int64_t stride,
                                 int64_t padding, bool wide);

}  // namespace braze
