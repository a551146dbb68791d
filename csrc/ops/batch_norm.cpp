// The forward and backward of batch normalisation + activation: schemas, checks, allocation, and
// the steps of plan/batch_norm.h in their order.
#include "batch_norm.h"

#include <torch/library.h>

#include "batch_norm_check.h"
#include "dense.h"
#include "launch.h"
#include "tensor_work.h"

namespace braze {
namespace {

// One normalised tensor of the forward.
struct Side {
  at::Tensor x, stats;
  ChannelTensors channels;
};

Side make_side(const char* suffix, const at::Tensor& input, const Norm& norm, bool training) {
  return {input, new_array(input, {kStatsRows, input.size(1)}),
          ChannelTensors("batch_norm_act", suffix, input, norm, training)};
}

void make_stats_of(Side& side, const ActivationShape& shape) {
  StatisticsArgs args;
  args.shape = shape;
  args.x = side.x.const_data_ptr();
  args.channels = side.channels.plain();
  args.stats = side.stats.mutable_data_ptr();
  launch(side.x, args);
  side.channels.written();
}

}  // namespace

ForwardResult batch_norm_act_forward(const at::Tensor& input, BRAZE_NORM_PARAMETERS(),
                                     const OptionalTensor& input2, BRAZE_NORM_PARAMETERS(2),
                                     const OptionalTensor& residual, bool training,
                                     int64_t activation, double parameter, bool save_mask) {
  constexpr const char* op = "batch_norm_act";
  const Activation act = checked_activation(activation);
  const auto [x, shape] = checked_input(op, input);
  TORCH_CHECK_VALUE(!training || shape.per_channel() != 1,
                    "Expected more than 1 value per channel when training, got input size ",
                    input.sizes());
  TORCH_CHECK_VALUE(!residual || !input2, op, ": residual and input2 cannot both be given");
  Side first = make_side("", x, BRAZE_NORM(), training);
  std::optional<Side> second;
  if (input2) {
    second = make_side("2", checked_like(op, "input2", *input2, x), BRAZE_NORM(2), training);
  }
  const at::Tensor added = residual ? checked_like(op, "residual", *residual, x) : at::Tensor();
  const bool masked = save_mask && mask_serves(act, added.defined());
  const at::Tensor y = new_like(x);
  const at::Tensor mask = new_mask(x, shape, masked);

  if (training) make_stats_of(first, shape);
  if (training && second) make_stats_of(*second, shape);
  RunningApplyArgs args;
  args.shape = shape;
  args.input[0] = {x.const_data_ptr(), first.stats.const_data_ptr()};
  if (second) args.input[1] = {second->x.const_data_ptr(), second->stats.const_data_ptr()};
  if (added.defined()) args.residual = added.const_data_ptr();
  args.activation = act;
  args.parameter = parameter;
  args.y = y.mutable_data_ptr();
  if (masked) args.mask = mask.mutable_data_ptr<uint8_t>();
  if (training) {
    launch<ApplyArgs>(x, args);
  } else {
    const auto use_running = [&](int k, Side& side) {
      args.channels[k] = side.channels.plain();
      args.stats[k] = side.stats.mutable_data_ptr();
    };
    use_running(0, first);
    if (second) use_running(1, *second);
    launch(x, args);
  }
  return {y, first.stats, second ? second->stats : new_array(x, {0}), mask};
}

BackwardResult batch_norm_act_backward(const at::Tensor& grad, const OptionalTensor& grad2,
                                       const at::Tensor& input, const OptionalTensor& weight,
                                       const at::Tensor& stats, const OptionalTensor& input2,
                                       const OptionalTensor& weight2, const OptionalTensor& stats2,
                                       const OptionalTensor& residual, const OptionalTensor& mask,
                                       bool training, int64_t activation, double parameter,
                                       std::array<bool, 7> output_mask) {
  constexpr const char* op = "batch_norm_act_backward";
  const auto [want_x, want_weight, want_bias, want_x2, want_weight2, want_bias2, want_residual] =
      output_mask;
  BackwardArgs args;
  args.activation = checked_activation(activation);
  args.parameter = parameter;
  args.batch_statistics = training;
  const DenseActivation dense = checked_input(op, input);
  const at::Tensor& x = dense.tensor;
  args.shape = dense.shape;
  args.count = static_cast<double>(args.shape.per_channel());
  const int64_t c = args.shape.c;
  const at::Tensor dy = checked_like(op, "grad", grad, x);
  args.dy = dy.const_data_ptr();
  at::Tensor dy2, x2, added;
  if (grad2) {
    dy2 = checked_like(op, "grad2", *grad2, x);
    args.dy2 = dy2.const_data_ptr();
  }
  args.input[0] = {x.const_data_ptr(), checked_array(op, "stats", stats, x, {kStatsRows, c})};
  if (input2) {
    TORCH_CHECK_VALUE(stats2, op, ": stats2 must be given with input2");
    x2 = checked_like(op, "input2", *input2, x);
    args.input[1] = {x2.const_data_ptr(), checked_array(op, "stats2", *stats2, x, {kStatsRows, c})};
  }
  if (residual) {
    added = checked_like(op, "residual", *residual, x);
    args.residual = added.const_data_ptr();
  }
  args.mask = checked_mask(op, mask, args.shape, x);

  BackwardResult result;
  const auto array_like = [&](bool wanted, const OptionalTensor& parameter_of) {
    const c10::ScalarType dtype = parameter_of ? parameter_of->scalar_type() : arithmetic_type(x);
    return new_array(x, {wanted ? c : 0}, dtype);
  };
  const auto like_x = [&](bool wanted) {
    return wanted ? new_like(x) : new_array(x, {0}, x.scalar_type());
  };
  result = {
      like_x(want_x),       array_like(want_weight, weight),   array_like(want_bias, weight),
      like_x(want_x2),      array_like(want_weight2, weight2), array_like(want_bias2, weight2),
      like_x(want_residual)};
  // Empty tensors have no memory for kernels to tell by which inputs there are.
  if (x.numel() == 0) {
    std::apply([](const auto&... gradient) { (gradient.zero_(), ...); }, result);
    return result;
  }
  const auto pointer = [](bool wanted, const at::Tensor& tensor) {
    return wanted ? tensor.mutable_data_ptr() : nullptr;
  };
  const auto fill = [&](InputGradient& g, bool x_wanted, const at::Tensor& dx, bool w_wanted,
                        const at::Tensor& dw, bool b_wanted, const at::Tensor& db) {
    g.param_dtype = DType::f32;
    if (w_wanted || b_wanted) g.param_dtype = *real_dtype(dw.scalar_type());
    g.grad_weight = pointer(w_wanted, dw);
    g.grad_bias = pointer(b_wanted, db);
    g.dx = pointer(x_wanted, dx);
  };
  fill(args.grad[0], want_x, std::get<0>(result), want_weight, std::get<1>(result), want_bias,
       std::get<2>(result));
  fill(args.grad[1], want_x2, std::get<3>(result), want_weight2, std::get<4>(result), want_bias2,
       std::get<5>(result));
  args.grad_residual = pointer(want_residual, std::get<6>(result));

  at::Tensor coefficients;
  if (want_x || want_x2) {
    coefficients = new_array(x, {2, kCoefficientRows, c});
    args.grad[0].coefficients = coefficients[0].mutable_data_ptr();
    if (input2) args.grad[1].coefficients = coefficients[1].mutable_data_ptr();
  }
  // Constant statistics and no gradient of a parameter: nothing to sum, but coefficients to make.
  launch(x, args);
  return result;
}

std::string norm_schema(const std::string& n, char alias) {
  std::string schema = "Tensor? weight" + n + ", Tensor? bias" + n;
  for (const char* name : {"running_mean", "running_var", "num_batches_tracked"}) {
    schema.append(", Tensor(").append(1, alias++).append("!)? ").append(name).append(n);
  }
  return schema + ", float? momentum" + n + ", float eps" + n;
}

TORCH_LIBRARY_FRAGMENT(braze, m) {
  m.def(("batch_norm_act_forward(Tensor input, " + norm_schema("", 'a') + ", Tensor? input2, " +
         norm_schema("2", 'd') +
         ", Tensor? residual, bool training, int activation, float parameter, bool save_mask) "
         "-> (Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def(
      "batch_norm_act_backward(Tensor grad, Tensor? grad2, Tensor input, Tensor? weight, "
      "Tensor stats, Tensor? input2, Tensor? weight2, Tensor? stats2, Tensor? residual, "
      "Tensor? mask, bool training, int activation, float parameter, bool[7] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

// One implementation: the checks, then the kernels of the tensors' device.
static void implement_batch_norm(torch::Library& m) {
  m.impl("batch_norm_act_forward", batch_norm_act_forward);
  m.impl("batch_norm_act_backward", batch_norm_act_backward);
}
TORCH_LIBRARY_IMPL(braze, CPU, m) { implement_batch_norm(m); }
TORCH_LIBRARY_IMPL(braze, CUDA, m) { implement_batch_norm(m); }

}  // namespace braze
