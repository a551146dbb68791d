// The steps of batch normalisation as operators of their own: statistics over several processes are
// moments -> all_gather -> combine -> apply, and backward reduce -> all_reduce -> apply_grad.
#include <torch/library.h>

#include "batch_norm_check.h"
#include "dense.h"
#include "launch.h"

namespace braze {
namespace {

// What reduce and apply_grad have in common; `kept` holds the tensors that the pointers are of.
BackwardArgs backward_args(const char* op, const at::Tensor& grad, const at::Tensor& input,
                           const at::Tensor& stats, const OptionalTensor& residual,
                           const OptionalTensor& mask, int64_t activation, double parameter,
                           std::vector<at::Tensor>& kept) {
  BackwardArgs args;
  args.activation = checked_activation(activation);
  args.parameter = parameter;
  const auto [x, shape] = checked_input(op, input);
  args.shape = shape;
  const at::Tensor dy = checked_like(op, "grad", grad, x);
  args.dy = dy.const_data_ptr();
  args.input[0] = {x.const_data_ptr(),
                   checked_array(op, "stats", stats, x, {kStatsRows, args.shape.c})};
  kept = {x, dy};
  args.mask = checked_mask(op, mask, args.shape, x);
  if (args.mask == nullptr && residual) {
    kept.push_back(checked_like(op, "residual", *residual, x));
    args.residual = kept.back().const_data_ptr();
  }
  return args;
}

}  // namespace

at::Tensor batch_norm_moments(const at::Tensor& input) {
  const auto [x, shape] = checked_input("batch_norm_moments", input);
  StatisticsArgs args;
  args.shape = shape;
  at::Tensor moments = new_array(x, {kMomentsRows, args.shape.c});
  args.x = x.const_data_ptr();
  args.moments = moments.mutable_data_ptr();
  launch(x, args);
  return moments;
}

at::Tensor batch_norm_combine(const at::Tensor& moments, const at::Tensor& input,
                              BRAZE_NORM_PARAMETERS()) {
  constexpr const char* op = "batch_norm_combine";
  const auto [x, shape] = checked_input(op, input);
  CombineArgs args;
  args.shape = shape;
  TORCH_CHECK_VALUE(moments.dim() == 3 && moments.size(0) >= 1, op,
                    ": moments must be [processes, 3, C], but its shape is ", moments.sizes());
  args.processes = moments.size(0);
  args.moments =
      checked_array(op, "moments", moments, x, {args.processes, kMomentsRows, args.shape.c});
  ChannelTensors channels(op, "", x, BRAZE_NORM(), true);
  args.channels = channels.plain();
  at::Tensor stats = new_array(x, {kStatsRows, args.shape.c});
  args.stats = stats.mutable_data_ptr();
  launch(x, args);
  channels.written();
  return stats;
}

std::tuple<at::Tensor, at::Tensor> batch_norm_apply(const at::Tensor& input,
                                                    const at::Tensor& stats,
                                                    const OptionalTensor& residual,
                                                    int64_t activation, double parameter) {
  constexpr const char* op = "batch_norm_apply";
  ApplyArgs args;
  args.activation = checked_activation(activation);
  args.parameter = parameter;
  const auto [x, shape] = checked_input(op, input);
  args.shape = shape;
  args.input[0] = {x.const_data_ptr(),
                   checked_array(op, "stats", stats, x, {kStatsRows, args.shape.c})};
  const at::Tensor added = residual ? checked_like(op, "residual", *residual, x) : at::Tensor();
  if (added.defined()) args.residual = added.const_data_ptr();
  const at::Tensor y = new_like(x);
  const bool masked = mask_serves(args.activation, added.defined());
  const at::Tensor mask = new_mask(x, args.shape, masked);
  args.y = y.mutable_data_ptr();
  if (masked) args.mask = mask.mutable_data_ptr<uint8_t>();
  launch(x, args);
  return {y, mask};
}

at::Tensor batch_norm_reduce(const at::Tensor& grad, const at::Tensor& input,
                             const at::Tensor& stats, const OptionalTensor& residual,
                             const OptionalTensor& mask, int64_t activation, double parameter) {
  std::vector<at::Tensor> kept;
  BackwardArgs args = backward_args("batch_norm_reduce", grad, input, stats, residual, mask,
                                    activation, parameter, kept);
  at::Tensor sums = new_array(kept[0], {2, args.shape.c});
  args.sums = sums.mutable_data_ptr();
  args.count = static_cast<double>(args.shape.per_channel());
  if (args.shape.numel() == 0) return sums.zero_();
  launch(kept[0], ReduceArgs{args});
  return sums;
}

std::tuple<at::Tensor, at::Tensor> batch_norm_apply_grad(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& stats,
    const OptionalTensor& residual, const OptionalTensor& mask, const at::Tensor& sums,
    const at::Tensor& count, int64_t activation, double parameter, bool need_residual) {
  constexpr const char* op = "batch_norm_apply_grad";
  std::vector<at::Tensor> kept;
  BackwardArgs args =
      backward_args(op, grad, input, stats, residual, mask, activation, parameter, kept);
  const at::Tensor& x = kept[0];
  CoefficientsArgs from;
  from.shape = args.shape;
  from.stats = args.input[0].stats;
  from.sums = checked_array(op, "sums", sums, x, {2, args.shape.c});
  from.count = checked_array(op, "count", count, x, {});
  const at::Tensor coefficients = new_array(x, {kCoefficientRows, args.shape.c});
  from.coefficients = args.grad[0].coefficients = coefficients.mutable_data_ptr();
  at::Tensor dx = new_like(x);
  at::Tensor grad_residual = need_residual ? new_like(x) : new_array(x, {0}, x.scalar_type());
  args.grad[0].dx = dx.mutable_data_ptr();
  if (need_residual) args.grad_residual = grad_residual.mutable_data_ptr();
  launch(x, from);
  launch(x, ApplyGradArgs{args});
  return {dx, grad_residual};
}

at::Tensor batch_norm_input_grad(const at::Tensor& grad, const at::Tensor& input,
                                 const at::Tensor& stats, const at::Tensor& coefficients) {
  constexpr const char* op = "batch_norm_input_grad";
  std::vector<at::Tensor> kept;
  BackwardArgs args = backward_args(op, grad, input, stats, std::nullopt, std::nullopt,
                                    static_cast<int64_t>(Activation::identity), 0, kept);
  const at::Tensor& x = kept[0];
  args.grad[0].coefficients = const_cast<void*>(
      checked_array(op, "coefficients", coefficients, x, {kCoefficientRows, args.shape.c}));
  at::Tensor dx = new_like(x);
  args.grad[0].dx = dx.mutable_data_ptr();
  launch(x, ApplyGradArgs{args});
  return dx;
}

TORCH_LIBRARY_FRAGMENT(braze, m) {
  m.def("batch_norm_moments(Tensor input) -> Tensor");
  m.def(("batch_norm_combine(Tensor moments, Tensor input, " + norm_schema("", 'a') + ") -> Tensor")
            .c_str());
  m.def(
      "batch_norm_apply(Tensor input, Tensor stats, Tensor? residual, int activation, float "
      "parameter) "
      "-> (Tensor, Tensor)");
  m.def(
      "batch_norm_reduce(Tensor grad, Tensor input, Tensor stats, Tensor? residual, Tensor? mask, "
      "int activation, float parameter) -> Tensor");
  m.def(
      "batch_norm_apply_grad(Tensor grad, Tensor input, Tensor stats, Tensor? residual, Tensor? "
      "mask, "
      "Tensor sums, Tensor count, int activation, float parameter, bool need_residual) "
      "-> (Tensor, Tensor)");
  m.def(
      "batch_norm_input_grad(Tensor grad, Tensor input, Tensor stats, Tensor coefficients) "
      "-> Tensor");
}

static void implement_batch_norm_steps(torch::Library& m) {
  m.impl("batch_norm_moments", batch_norm_moments);
  m.impl("batch_norm_combine", batch_norm_combine);
  m.impl("batch_norm_apply", batch_norm_apply);
  m.impl("batch_norm_reduce", batch_norm_reduce);
  m.impl("batch_norm_apply_grad", batch_norm_apply_grad);
  m.impl("batch_norm_input_grad", batch_norm_input_grad);
}
TORCH_LIBRARY_IMPL(braze, CPU, m) { implement_batch_norm_steps(m); }
TORCH_LIBRARY_IMPL(braze, CUDA, m) { implement_batch_norm_steps(m); }

}  // namespace braze
