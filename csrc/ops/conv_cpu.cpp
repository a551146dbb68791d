// The CPU's column of the launch table: convolutions between batch norms. The reference that the
// kernels are compared with: torch's convolution in fp32, and the CPU's batch norm.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "launch.h"

namespace braze {
namespace {

// Neither autograd nor autocast has a say in here.
struct Plainly {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                           c10::autocast_dispatch_keyset};
};

c10::ScalarType torch_dtype(DType dtype) {
  return dtype == DType::f32 ? c10::kFloat : dtype == DType::bf16 ? c10::kBFloat16 : c10::kHalf;
}

// Memory of kernels, [n][h][w][c], as a tensor [n, c, h, w].
at::Tensor image(const void* data, int64_t n, int64_t c, int64_t h, int64_t w, DType dtype) {
  return at::from_blob(const_cast<void*>(data), {n, c, h, w}, {h * w * c, 1, w * c, c},
                       torch_dtype(dtype));
}
at::Tensor input_image(const ConvShape& s, const void* data) {
  return image(data, s.n, s.c, s.h, s.w, s.dtype);
}
at::Tensor output_image(const ConvShape& s, const void* data) {
  return image(data, s.n, s.k, s.out_h, s.out_w, s.dtype);
}
at::Tensor weight_image(const ConvShape& s, const void* data, DType dtype) {
  return image(data, s.k, s.c, s.kernel, s.kernel, dtype);
}

// What the convolution sees of its input, in fp32.
at::Tensor convolved(const ConvShape& shape, const ConvInput& input) {
  const at::Tensor x = input_image(shape, input.x);
  if (input.stats == nullptr) return x.to(c10::kFloat);
  const at::Tensor y = at::empty_like(x);
  ApplyArgs args;
  args.shape = shape.input();
  args.input[0] = {input.x, input.stats};
  args.activation = input.activation;
  args.parameter = input.parameter;
  args.y = y.mutable_data_ptr();
  launch_on_cpu(-1, x, args);
  return y.to(c10::kFloat);
}

// The gradient of its output, in fp32.
at::Tensor gradient(const ConvShape& shape, const ConvOutputGradient& grad) {
  const at::Tensor d = output_image(shape, grad.d);
  if (grad.coefficients == nullptr) return d.to(c10::kFloat);
  const at::Tensor dx = at::empty_like(d);
  ApplyGradArgs args;
  args.shape = shape.output();
  args.dy = grad.d;
  args.input[0] = {grad.x, grad.stats};
  args.grad[0].coefficients = const_cast<void*>(grad.coefficients);
  args.grad[0].dx = dx.mutable_data_ptr();
  launch_on_cpu(-1, d, args);
  return dx.to(c10::kFloat);
}

// The gradient of the input or of the weight.
at::Tensor differentiated(const ConvShape& s, const at::Tensor& grad, const at::Tensor& input,
                          const at::Tensor& weight, bool of_input) {
  const auto both = std::array<bool, 3>{of_input, !of_input, false};
  const auto found =
      at::convolution_backward(grad, input, weight, std::nullopt, {s.stride, s.stride},
                               {s.padding, s.padding}, {1, 1}, false, {0, 0}, 1, both);
  return of_input ? std::get<0>(found) : std::get<1>(found);
}

}  // namespace

template <>
void launch_on_cpu(int, const at::Tensor& like, const ConvForwardArgs& args) {
  const Plainly plainly;
  const ConvShape& s = args.shape;
  const at::Tensor weight = weight_image(s, args.weight, s.dtype).to(c10::kFloat);
  output_image(s, args.output)
      .copy_(at::convolution(convolved(s, args.input), weight, std::nullopt, {s.stride, s.stride},
                             {s.padding, s.padding}, {1, 1}, false, {0, 0}, 1));
  StatisticsArgs statistics;
  statistics.shape = s.output();
  statistics.x = args.output;
  statistics.channels = args.channels;
  statistics.stats = args.stats;
  launch_on_cpu(-1, like, statistics);
}

template <>
void launch_on_cpu(int, const at::Tensor& like, const ConvInputGradArgs& args) {
  const Plainly plainly;
  const ConvShape& s = args.shape;
  const at::Tensor weight = weight_image(s, args.weight, s.dtype).to(c10::kFloat);
  const at::Tensor result = input_image(s, args.result);
  // Of the input it takes the shape.
  const at::Tensor dy =
      differentiated(s, gradient(s, args.grad), result.to(c10::kFloat), weight, true);
  result.copy_(dy);
  if (args.input.stats == nullptr) return;
  BackwardArgs back;
  back.shape = s.input();
  back.count = static_cast<double>(back.shape.per_channel());
  back.dy = args.result;
  back.input[0] = {args.input.x, args.input.stats};
  back.activation = args.input.activation;
  back.parameter = args.input.parameter;
  back.grad_residual = args.result;  // d in the place of dy
  launch_on_cpu(-1, like, ApplyGradArgs{back});
  back.activation = Activation::identity;
  back.grad_residual = nullptr;
  back.grad[0] = args.norm;
  launch_on_cpu(-1, like, ReduceArgs{back});
}

template <>
void launch_on_cpu(int, const at::Tensor&, const ConvWeightGradArgs& args) {
  const Plainly plainly;
  const ConvShape& s = args.shape;
  const at::Tensor result = weight_image(s, args.result, args.result_dtype);
  // Of the weight it takes the shape.
  result.copy_(differentiated(s, gradient(s, args.grad), convolved(s, args.input),
                              result.to(c10::kFloat), false));
}

}  // namespace braze
