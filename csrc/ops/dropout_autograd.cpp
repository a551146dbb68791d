// Dropout's gradients. Nothing is saved but the mask's seed and offset, and what an activation
// needs.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_make_dual.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "activation.h"
#include "dropout.h"

namespace braze {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool needs_grad(const at::Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad();
}

// A dense tensor's dimensions from the outermost in memory inwards; empty if that is 0, 1, 2 ...
std::vector<int64_t> order_in_memory(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) return {};
  const c10::SymIntArrayRef strides = tensor.sym_strides();
  std::vector<int64_t> order(strides.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return strides[static_cast<size_t>(a)] > strides[static_cast<size_t>(b)];
  });
  return order;
}

// A gradient in the order in memory of the tensor that was dropped from: the mask is indexed in it.
at::Tensor in_order(const at::Tensor& grad, const std::vector<int64_t>& order) {
  if (order.empty()) return grad.contiguous();
  std::vector<int64_t> inverse(order.size());
  for (size_t d = 0; d < order.size(); ++d) {
    inverse[static_cast<size_t>(order[d])] = static_cast<int64_t>(d);
  }
  return grad.permute(order).contiguous().permute(inverse);
}

// What a backward needs to know beyond tensors.
struct Saved {
  double p;
  bool alpha, feature;
  std::vector<int64_t> order;

  // As one list of numbers.
  void save(AutogradContext* ctx) const {
    std::vector<double> numbers = {p, static_cast<double>(alpha), static_cast<double>(feature)};
    numbers.insert(numbers.end(), order.begin(), order.end());
    ctx->saved_data["call"] = std::move(numbers);
  }
  static Saved load(AutogradContext* ctx) {
    const std::vector<double> n = ctx->saved_data["call"].toDoubleVector();
    return {n[0], n[1] != 0, n[2] != 0, {n.begin() + 3, n.end()}};
  }
};

at::Tensor scale_grad(AutogradContext* ctx, const at::Tensor& grad) {
  const Saved saved = Saved::load(ctx);
  // A mask per channel does not depend on the order.
  const at::Tensor ordered = saved.feature ? grad : in_order(grad, saved.order);
  return dropout_apply(ordered, ctx->get_saved_variables()[0], saved.p, saved.alpha, saved.feature,
                       true);
}

void save_scale(AutogradContext* ctx, const at::Tensor& output, const at::Tensor& state, double p,
                bool alpha, bool feature) {
  Saved{p, alpha, feature, order_in_memory(output)}.save(ctx);
  ctx->save_for_backward({state});
}

struct Dropout : Function<Dropout> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, double p, bool alpha,
                               bool feature, const OptionalGenerator& generator,
                               const OptionalTensor& distinct) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, state] = dropout(input, p, alpha, feature, generator, distinct);
    save_scale(ctx, output, state, p, alpha, feature);
    ctx->mark_non_differentiable({state});
    return {output, state};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    if (grads[0].defined()) result[0] = scale_grad(ctx, grads[0]);
    return result;
  }
};

// `used` becomes the seed and offset: an input that is a view allows one output only.
struct DropoutInPlace : Function<DropoutInPlace> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor input, double p, bool alpha,
                            bool feature, const OptionalGenerator& generator, at::Tensor* used) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor state = *used = dropout_(input, p, alpha, feature, generator);
    // A tensor with gaps was copied, in the order that empty_like gives the copy.
    save_scale(ctx, input.is_non_overlapping_and_dense() ? input : at::empty_like(input), state, p,
               alpha, feature);
    ctx->mark_dirty({input});
    return input;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    if (grads[0].defined()) result[0] = scale_grad(ctx, grads[0]);
    return result;
  }
};

struct DropoutApply : Function<DropoutApply> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& input,
                               const at::Tensor& state, double p, bool alpha, bool feature,
                               bool gradient) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor output = dropout_apply(input, state, p, alpha, feature, gradient);
    save_scale(ctx, output, state, p, alpha, feature);
    return {output};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    if (grads[0].defined()) result[0] = scale_grad(ctx, grads[0]);
    return result;
  }
};

struct DropoutAdd : Function<DropoutAdd> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& input,
                               const at::Tensor& residual, double p,
                               const OptionalGenerator& generator, const OptionalTensor& distinct) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, state] = dropout_add(input, residual, p, generator, distinct);
    save_scale(ctx, output, state, p, false, false);
    ctx->mark_non_differentiable({state});
    return {output, state};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(5);
    if (!grads[0].defined()) return result;
    if (ctx->needs_input_grad(0)) result[0] = scale_grad(ctx, grads[0]);
    result[1] = grads[0];
    return result;
  }
};

bool output_says_all(std::string_view activation) { return activation == "relu"; }

struct ActDropout : Function<ActDropout> {
  using Packed = std::tuple<double, std::string, double>;
  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, double p,
                               std::string_view activation, double parameter,
                               const OptionalGenerator& generator, const OptionalTensor& distinct) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, state] = act_dropout(input, p, activation, parameter, generator, distinct);
    save(ctx, output_says_all(activation) ? output : input, state, p, activation, parameter);
    ctx->mark_non_differentiable({state});
    return {output, state};
  }
  static void save(AutogradContext* ctx, const at::Tensor& saved, const at::Tensor& state, double p,
                   std::string_view activation, double parameter) {
    ctx->save_for_backward({saved, state});
    ctx->saved_data["call"] = Packed(p, std::string(activation), parameter);
  }
  static at::Tensor grad_of(AutogradContext* ctx, const at::Tensor& grad) {
    const variable_list saved = ctx->get_saved_variables();
    const auto [p, activation, parameter] = ctx->saved_data["call"].to<Packed>();
    return act_dropout_backward(grad, saved[0], saved[1], p, activation, parameter);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    if (grads[0].defined()) result[0] = grad_of(ctx, grads[0]);
    return result;
  }
};

// before: a copy of the input, with its history; none if the output is saved.
struct ActDropoutInPlace : Function<ActDropoutInPlace> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor input, const OptionalTensor& before,
                            double p, std::string_view activation, double parameter,
                            const OptionalGenerator& generator, at::Tensor* used) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor state = *used = act_dropout_(input, p, activation, parameter, generator);
    ActDropout::save(ctx, before.has_value() ? *before : input, state, p, activation, parameter);
    ctx->mark_dirty({input});
    return input;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(7);
    if (grads[0].defined()) result[0] = ActDropout::grad_of(ctx, grads[0]);
    return result;
  }
};

// Linear in grad; `saved` is a constant.
struct ActDropoutBackward : Function<ActDropoutBackward> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad,
                               const at::Tensor& saved, const at::Tensor& state, double p,
                               std::string_view activation, double parameter) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ActDropout::save(ctx, saved, state, p, activation, parameter);
    return {act_dropout_backward(grad, saved, state, p, activation, parameter)};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    if (grads[0].defined()) result[0] = ActDropout::grad_of(ctx, grads[0]);
    return result;
  }
};

DropoutResult pair(const variable_list& outputs) { return {outputs[0], outputs[1]}; }

// What the in-place operators of torch check and do beside autograd.
void check_inplace(const at::Tensor& input) {
  torch::autograd::check_inplace(input, needs_grad(input));
}

DropoutResult dropout_autograd(const at::Tensor& input, double p, bool alpha, bool feature,
                               OptionalGenerator generator, const OptionalTensor& distinct) {
  if (needs_grad(input)) {
    return pair(Dropout::apply(input, p, alpha, feature, generator, distinct));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return dropout(input, p, alpha, feature, generator, distinct);
}

at::Tensor dropout_inplace_autograd(at::Tensor& input, double p, bool alpha, bool feature,
                                    OptionalGenerator generator) {
  check_inplace(input);
  at::Tensor state;
  if (needs_grad(input)) {
    DropoutInPlace::apply(input, p, alpha, feature, generator, &state);
    return state;
  }
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    state = dropout_(input, p, alpha, feature, generator);
  }
  torch::autograd::increment_version(input);
  return state;
}

// `linear` of a gradient that has a tangent: forward over reverse.
template <class Linear>
at::Tensor with_tangent(const at::Tensor& grad, const Linear& linear) {
  const at::Tensor primal = linear(grad._fw_primal(0));
  return at::_make_dual(primal, linear(grad._fw_grad(0)), 0);
}

at::Tensor dropout_apply_autograd(const at::Tensor& input, const at::Tensor& state, double p,
                                  bool alpha, bool feature, bool gradient) {
  if (gradient && input._fw_grad(0).defined()) {
    const std::vector<int64_t> order = order_in_memory(input);
    return with_tangent(input, [&](const at::Tensor& part) {
      return dropout_apply(feature ? part : in_order(part, order), state, p, alpha, feature, true);
    });
  }
  if (needs_grad(input)) return DropoutApply::apply(input, state, p, alpha, feature, gradient)[0];
  const at::AutoDispatchBelowADInplaceOrView guard;
  return dropout_apply(input, state, p, alpha, feature, gradient);
}

DropoutResult dropout_add_autograd(const at::Tensor& input, const at::Tensor& residual, double p,
                                   OptionalGenerator generator, const OptionalTensor& distinct) {
  if (needs_grad(input) || needs_grad(residual)) {
    return pair(DropoutAdd::apply(input, residual, p, generator, distinct));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return dropout_add(input, residual, p, generator, distinct);
}

DropoutResult act_dropout_autograd(const at::Tensor& input, double p, std::string_view activation,
                                   double parameter, OptionalGenerator generator,
                                   const OptionalTensor& distinct) {
  if (needs_grad(input)) {
    return pair(ActDropout::apply(input, p, activation, parameter, generator, distinct));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return act_dropout(input, p, activation, parameter, generator, distinct);
}

at::Tensor act_dropout_inplace_autograd(at::Tensor& input, double p, std::string_view activation,
                                        double parameter, OptionalGenerator generator) {
  check_inplace(input);
  at::Tensor state;
  if (needs_grad(input)) {
    OptionalTensor before;
    if (!output_says_all(activation)) before = input.clone();
    ActDropoutInPlace::apply(input, before, p, activation, parameter, generator, &state);
    return state;
  }
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    state = act_dropout_(input, p, activation, parameter, generator);
  }
  torch::autograd::increment_version(input);
  return state;
}

at::Tensor act_dropout_backward_autograd(const at::Tensor& grad, const at::Tensor& saved,
                                         const at::Tensor& state, double p, std::string_view name,
                                         double parameter) {
  const Activation activation = activation_named(name);
  if (grad._fw_grad(0).defined()) {
    return with_tangent(grad, [&](const at::Tensor& part) {
      return act_dropout_backward(part, saved, state, p, name, parameter);
    });
  }
  if (needs_grad(saved) && is_curved(activation)) {
    const at::Tensor copy = saved.is_non_overlapping_and_dense() ? saved : at::empty_like(saved);
    const at::Tensor dropped =
        dropout_apply(in_order(grad, order_in_memory(copy)), state, p, false, false, true);
    return gradient_by_torch(dropped, saved, activation, parameter);
  }
  if (needs_grad(grad)) {
    return ActDropoutBackward::apply(grad, saved.detach(), state, p, name, parameter)[0];
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return act_dropout_backward(grad, saved, state, p, name, parameter);
}

}  // namespace
}  // namespace braze

TORCH_LIBRARY_IMPL(braze, Autograd, m) {
  m.impl("dropout", braze::dropout_autograd);
  m.impl("dropout_", braze::dropout_inplace_autograd);
  m.impl("dropout_apply", braze::dropout_apply_autograd);
  m.impl("dropout_add", braze::dropout_add_autograd);
  m.impl("act_dropout", braze::act_dropout_autograd);
  m.impl("act_dropout_", braze::act_dropout_inplace_autograd);
  m.impl("act_dropout_backward", braze::act_dropout_backward_autograd);
}
