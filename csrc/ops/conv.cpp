#include "conv.h"

#include <torch/library.h>

#include "activation.h"
#include "batch_norm_check.h"
#include "launch.h"
#include "tensor_work.h"

namespace braze {
namespace {

constexpr auto kChannelsLast = c10::MemoryFormat::ChannelsLast;

// As kernels read it: channels last, from a 16-byte boundary on.
at::Tensor for_kernels(const at::Tensor& tensor, c10::ScalarType dtype) {
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  if (aligned && tensor.scalar_type() == dtype && tensor.is_contiguous(kChannelsLast)) {
    return tensor;
  }
  at::Tensor copy = new_array(tensor, tensor.sizes(), dtype, kChannelsLast);
  return copy.copy_(tensor);
}

at::Tensor new_image(const at::Tensor& like, at::IntArrayRef sizes) {
  return new_array(like, sizes, like.scalar_type(), kChannelsLast);
}

// Raises unless it can be an image of a convolution.
void check_image(const char* op, const char* name, const at::Tensor& image) {
  check_readable(op, name, image);
  const c10::ScalarType dtype = image.scalar_type();
  TORCH_CHECK_TYPE(dtype == c10::kBFloat16 || dtype == c10::kHalf, op, ": ", name,
                   " must be bfloat16 or float16, but it is ", dtype);
  TORCH_CHECK_VALUE(image.dim() == 4, op, ": ", name,
                    " must have 4 dimensions, [N, C, H, W], but its shape is ", image.sizes());
}

// Raises unless it fits `image`. Returns it in the image's dtype.
at::Tensor checked_weight(const char* op, const at::Tensor& weight, const at::Tensor& image) {
  check_readable(op, "conv_weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == weight.size(3), op,
                    ": conv_weight must be [K, C, r, r], but its shape is ", weight.sizes());
  TORCH_CHECK_VALUE(weight.device() == image.device(), op, ": conv_weight is on ", weight.device(),
                    ", but the images are on ", image.device());
  return for_kernels(weight, image.scalar_type());
}

// With the size of the output. Raises ValueError unless there are kernels for it.
ConvShape checked_shape(const char* op, const at::Tensor& image, int64_t n, int64_t c,
                        at::IntArrayRef input_size, int64_t k, int64_t kernel, int64_t stride,
                        int64_t padding) {
  TORCH_CHECK_VALUE(kernel == 1 || kernel == 3, op, ": the kernel must be 1x1 or 3x3, but it is ",
                    kernel, "x", kernel);
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, op, ": stride must be 1 or 2, but it is ", stride);
  TORCH_CHECK_VALUE(padding >= 0 && padding <= kernel, op, ": padding must be between 0 and ",
                    kernel, ", but it is ", padding);
  TORCH_CHECK_VALUE(c > 0 && c % 8 == 0 && k > 0 && k % 8 == 0, op,
                    ": channels must be multiples of 8, but there are ", c, " of the input and ", k,
                    " of the output");
  TORCH_CHECK_VALUE(input_size.size() == 2, op, ": input_size must be [H, W], but it is ",
                    input_size);
  ConvShape shape;
  shape.n = n, shape.c = c, shape.k = k;
  shape.h = input_size[0], shape.w = input_size[1];
  const auto windows = [&](int64_t size) {
    return size > 0 && size + 2 * padding >= kernel ? (size + 2 * padding - kernel) / stride + 1
                                                    : 0;
  };
  shape.out_h = windows(shape.h), shape.out_w = windows(shape.w);
  TORCH_CHECK_VALUE(shape.out_h > 0 && shape.out_w > 0, op, ": an input of ", shape.h, "x", shape.w,
                    " pixels is smaller than the kernel, ", kernel, "x", kernel);
  shape.kernel = static_cast<int32_t>(kernel), shape.stride = static_cast<int32_t>(stride);
  shape.padding = static_cast<int32_t>(padding);
  shape.dtype = *real_dtype(image.scalar_type());
  return shape;
}

// Null if there is none, else float[rows][channels].
const void* checked_rows(const char* op, const char* name, const OptionalTensor& rows,
                         const at::Tensor& image, int64_t count, int64_t channels) {
  return rows ? checked_array(op, name, *rows, image, {count, channels}) : nullptr;
}

// All but x.
ConvInput checked_normalisation(const char* op, const OptionalTensor& stats,
                                const at::Tensor& image, int64_t channels, int64_t activation,
                                double parameter) {
  ConvInput input;
  input.stats = checked_rows(op, "input_stats", stats, image, kStatsRows, channels);
  input.activation = checked_activation(activation);
  input.parameter = parameter;
  TORCH_CHECK_VALUE(is_recomputed(input.activation), op,
                    ": activation must be identity, relu, relu6 or leaky_relu, but it is ",
                    name_of(input.activation));
  return input;
}

// The gradient of an output, and the tensors that it is in.
struct OutputGradient {
  at::Tensor d, x;
  ConvOutputGradient plain;
};

OutputGradient checked_gradient(const char* op, const at::Tensor& grad,
                                const OptionalTensor& grad_input, const OptionalTensor& grad_stats,
                                const OptionalTensor& coefficients) {
  TORCH_CHECK_VALUE(grad_input.has_value() == grad_stats.has_value() &&
                        grad_stats.has_value() == coefficients.has_value(),
                    op, ": grad_input, grad_stats and coefficients must be given together");
  OutputGradient g;
  if (grad_input) check_like(op, "grad_input", *grad_input, grad, "grad");
  const int64_t k = grad.size(1);
  g.plain.stats = checked_rows(op, "grad_stats", grad_stats, grad, kStatsRows, k);
  g.plain.coefficients = checked_rows(op, "coefficients", coefficients, grad, kCoefficientRows, k);
  g.d = for_kernels(grad, grad.scalar_type());
  g.plain.d = g.d.const_data_ptr();
  if (grad_input) {
    g.x = for_kernels(*grad_input, grad.scalar_type());
    g.plain.x = g.x.const_data_ptr();
  }
  return g;
}

void check_output(const char* op, const at::Tensor& grad, const ConvShape& shape) {
  const std::array<int64_t, 4> sizes = {shape.n, shape.k, shape.out_h, shape.out_w};
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(sizes), op,
                    ": grad must have the output's shape ", at::IntArrayRef(sizes),
                    ", but its shape is ", grad.sizes());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> conv_norm_forward(const at::Tensor& input,
                                                     const OptionalTensor& input_stats,
                                                     int64_t activation, double parameter,
                                                     const at::Tensor& conv_weight, int64_t stride,
                                                     int64_t padding, BRAZE_NORM_PARAMETERS()) {
  constexpr const char* op = "conv_norm_forward";
  check_image(op, "input", input);
  const at::Tensor w = checked_weight(op, conv_weight, input);
  TORCH_CHECK_VALUE(w.size(1) == input.size(1), op, ": conv_weight must have input's ",
                    input.size(1), " channels, but its shape is ", w.sizes());
  ConvForwardArgs args;
  args.shape = checked_shape(op, input, input.size(0), input.size(1), input.sizes().slice(2),
                             w.size(0), w.size(2), stride, padding);
  args.input = checked_normalisation(op, input_stats, input, args.shape.c, activation, parameter);
  const ActivationShape out = args.shape.output();
  const at::Tensor output = new_image(input, {out.n, out.c, args.shape.out_h, args.shape.out_w});
  TORCH_CHECK_VALUE(out.per_channel() != 1,
                    "Expected more than 1 value per channel when training, got input size ",
                    output.sizes());
  ChannelTensors channels(op, "", output, BRAZE_NORM(), true);
  const at::Tensor stats = new_array(input, {kStatsRows, out.c});
  const at::Tensor x = for_kernels(input, input.scalar_type());
  args.channels = channels.plain();
  args.stats = stats.mutable_data_ptr();
  if (out.numel() == 0) {
    StatisticsArgs empty;
    empty.shape = out;
    empty.channels = args.channels;
    empty.stats = args.stats;
    launch(input, empty);
  } else {
    args.input.x = x.const_data_ptr();
    args.weight = w.const_data_ptr();
    args.output = output.mutable_data_ptr();
    launch(input, args);
  }
  channels.written();
  return {output, stats};
}

ConvInputGradResult conv_norm_input_grad(
    const at::Tensor& grad, const OptionalTensor& grad_input, const OptionalTensor& grad_stats,
    const OptionalTensor& coefficients, const at::Tensor& conv_weight, const OptionalTensor& input,
    const OptionalTensor& input_stats, const OptionalTensor& input_weight, int64_t activation,
    double parameter, at::IntArrayRef input_size, int64_t stride, int64_t padding) {
  constexpr const char* op = "conv_norm_input_grad";
  check_image(op, "grad", grad);
  const at::Tensor w = checked_weight(op, conv_weight, grad);
  ConvInputGradArgs args;
  args.shape = checked_shape(op, grad, grad.size(0), w.size(1), input_size, w.size(0), w.size(2),
                             stride, padding);
  const ConvShape& shape = args.shape;
  check_output(op, grad, shape);
  args.input = checked_normalisation(op, input_stats, grad, shape.c, activation, parameter);
  TORCH_CHECK_VALUE(input.has_value() == input_stats.has_value(), op,
                    ": input and input_stats must be given together");
  const at::Tensor result = new_image(grad, {shape.n, shape.c, shape.h, shape.w});
  at::Tensor x;
  c10::ScalarType vectors = c10::kFloat;
  if (input) {
    check_like(op, "input", *input, result, "the result");
    x = for_kernels(*input, input->scalar_type());
    args.input.x = x.const_data_ptr();
    if (input_weight) {
      check_readable(op, "input_weight", *input_weight);
      vectors = input_weight->scalar_type();
    }
  }
  const OutputGradient g = checked_gradient(op, grad, grad_input, grad_stats, coefficients);
  args.grad = g.plain;
  const int64_t c = input ? shape.c : 0;
  const at::Tensor rows = new_array(grad, {input ? kCoefficientRows : 0, c});
  const at::Tensor grad_weight = new_array(grad, {c}, vectors);
  const at::Tensor grad_bias = new_array(grad, {c}, vectors);
  if (shape.n == 0) {
    rows.zero_(), grad_weight.zero_(), grad_bias.zero_();
    return {result, rows, grad_weight, grad_bias};
  }
  if (input) {
    args.norm.param_dtype = *real_dtype(vectors);
    args.norm.grad_weight = grad_weight.mutable_data_ptr();
    args.norm.grad_bias = grad_bias.mutable_data_ptr();
    args.norm.coefficients = rows.mutable_data_ptr();
  }
  args.weight = w.const_data_ptr();
  args.result = result.mutable_data_ptr();
  launch(grad, args);
  return {result, rows, grad_weight, grad_bias};
}

at::Tensor conv_norm_weight_grad(const at::Tensor& input, const OptionalTensor& input_stats,
                                 int64_t activation, double parameter, const at::Tensor& grad,
                                 const OptionalTensor& grad_input, const OptionalTensor& grad_stats,
                                 const OptionalTensor& coefficients, int64_t kernel, int64_t stride,
                                 int64_t padding, bool wide) {
  constexpr const char* op = "conv_norm_weight_grad";
  check_image(op, "input", input);
  check_image(op, "grad", grad);
  TORCH_CHECK_TYPE(grad.scalar_type() == input.scalar_type(), op, ": grad must have input's dtype ",
                   input.scalar_type(), ", but it is ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.device() == input.device(), op, ": grad is on ", grad.device(),
                    ", but input is on ", input.device());
  ConvWeightGradArgs args;
  args.shape = checked_shape(op, input, input.size(0), input.size(1), input.sizes().slice(2),
                             grad.size(1), kernel, stride, padding);
  const ConvShape& shape = args.shape;
  check_output(op, grad, shape);
  args.input = checked_normalisation(op, input_stats, input, shape.c, activation, parameter);
  const OutputGradient g = checked_gradient(op, grad, grad_input, grad_stats, coefficients);
  args.grad = g.plain;
  const at::Tensor x = for_kernels(input, input.scalar_type());
  args.input.x = x.const_data_ptr();
  const c10::ScalarType dtype = wide ? c10::kFloat : input.scalar_type();
  const at::Tensor result =
      new_array(input, {shape.k, shape.c, kernel, kernel}, dtype, kChannelsLast);
  if (shape.n == 0) return result.zero_();
  args.result = result.mutable_data_ptr();
  args.result_dtype = *real_dtype(dtype);
  launch(input, args);
  return result;
}

TORCH_LIBRARY_FRAGMENT(braze, m) {
  m.def(("conv_norm_forward(Tensor input, Tensor? input_stats, int activation, float parameter, "
         "Tensor conv_weight, int stride, int padding, " +
         norm_schema("", 'a') + ") -> (Tensor, Tensor)")
            .c_str());
  m.def(
      "conv_norm_input_grad(Tensor grad, Tensor? grad_input, Tensor? grad_stats, "
      "Tensor? coefficients, Tensor conv_weight, Tensor? input, Tensor? input_stats, "
      "Tensor? input_weight, int activation, float parameter, int[2] input_size, int stride, "
      "int padding) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_norm_weight_grad(Tensor input, Tensor? input_stats, int activation, float parameter, "
      "Tensor grad, Tensor? grad_input, Tensor? grad_stats, Tensor? coefficients, int kernel, "
      "int stride, int padding, bool wide) -> Tensor");
}

static void implement_conv(torch::Library& m) {
  m.impl("conv_norm_forward", conv_norm_forward);
  m.impl("conv_norm_input_grad", conv_norm_input_grad);
  m.impl("conv_norm_weight_grad", conv_norm_weight_grad);
}
TORCH_LIBRARY_IMPL(braze, CPU, m) { implement_conv(m); }
TORCH_LIBRARY_IMPL(braze, CUDA, m) { implement_conv(m); }

}  // namespace braze
