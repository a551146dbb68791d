// Dropout's gradients. Nothing is saved but the mask's seed and offset, and what an activation
// needs.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_make_dual.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/FunctionRef.h>
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

// The dimensions of a tensor, or of the dense copy that kernels make of one with gaps, from the
// outermost in memory inwards; empty if that is 0, 1, 2 ...
std::vector<int64_t> order_in_memory(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) return {};
  if (!tensor.is_non_overlapping_and_dense()) {
    return order_in_memory(at::empty_like(tensor, tensor.options().device(c10::kMeta)));
  }
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
  bool alpha = false, feature = false;
  Activation activation = Activation::identity;
  double parameter = 0;
  bool added = false;  // a residual
  std::vector<int64_t> order = {};

  // As one list of numbers.
  void save(AutogradContext* ctx) const {
    std::vector<double> numbers = {p,
                                   static_cast<double>(alpha),
                                   static_cast<double>(feature),
                                   static_cast<double>(activation),
                                   parameter,
                                   static_cast<double>(added)};
    numbers.insert(numbers.end(), order.begin(), order.end());
    ctx->saved_data["call"] = std::move(numbers);
  }
  static Saved load(AutogradContext* ctx) {
    const std::vector<double> n = ctx->saved_data["call"].toDoubleVector();
    return {n[0],
            n[1] != 0,
            n[2] != 0,
            static_cast<Activation>(n[3]),
            n[4],
            n[5] != 0,
            {n.begin() + 6, n.end()}};
  }
};

// An operator without its autograd.
struct Operation {
  c10::function_ref<DropoutResult()> run;
  Saved saved;
  bool in_place = false;
  // For an activation: what its derivative is computed from. Undefined: the output.
  OptionalTensor from = std::nullopt;
};

// Every operator's, as each is linear in the gradient: that of output = d input + residual. The
// seed and offset are no output: an input that is a view allows one only.
struct Dropout : Function<Dropout> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input,
                            const OptionalTensor& residual, const Operation& op,
                            at::Tensor* state) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor output;
    std::tie(output, *state) = op.run();
    Saved saved = op.saved;
    saved.added = residual.has_value();
    if (op.from.has_value()) {
      ctx->save_for_backward({op.from->defined() ? *op.from : output, *state});
    } else {
      saved.order = order_in_memory(output);
      ctx->save_for_backward({*state});
    }
    saved.save(ctx);
    if (op.in_place) ctx->mark_dirty({input});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(4);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const Saved call = Saved::load(ctx);
    if (ctx->needs_input_grad(0)) {
      const variable_list saved = ctx->get_saved_variables();
      if (saved.size() == 2) {
        result[0] = act_dropout_backward(grad, saved[0], saved[1], call.p, name_of(call.activation),
                                         call.parameter);
      } else {
        // A mask per channel does not depend on the order.
        const at::Tensor ordered = call.feature ? grad : in_order(grad, call.order);
        result[0] = dropout_apply(ordered, saved[0], call.p, call.alpha, call.feature, true);
      }
    }
    if (call.added) result[1] = grad;
    return result;
  }
};

DropoutResult differentiable(const at::Tensor& input, const Operation& op,
                             const OptionalTensor& residual = std::nullopt) {
  if (needs_grad(input) || (residual.has_value() && needs_grad(*residual))) {
    at::Tensor state;
    const at::Tensor output = Dropout::apply(input, residual, op, &state);
    return {output, state};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  DropoutResult result = op.run();
  if (op.in_place) torch::autograd::increment_version(input);
  return result;
}

DropoutResult dropout_autograd(const at::Tensor& input, double p, bool alpha, bool feature,
                               OptionalGenerator generator, const OptionalTensor& distinct) {
  const auto run = [&] { return dropout(input, p, alpha, feature, generator, distinct); };
  return differentiable(input, {run, {p, alpha, feature}});
}

at::Tensor dropout_inplace_autograd(at::Tensor& input, double p, bool alpha, bool feature,
                                    OptionalGenerator generator) {
  // What the in-place operators of torch check beside autograd.
  torch::autograd::check_inplace(input, needs_grad(input));
  const auto run = [&] {
    return DropoutResult(input, dropout_(input, p, alpha, feature, generator));
  };
  return std::get<1>(differentiable(input, {run, {p, alpha, feature}, true}));
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
  const auto run = [&] {
    return DropoutResult(dropout_apply(input, state, p, alpha, feature, gradient), state);
  };
  return std::get<0>(differentiable(input, {run, {p, alpha, feature}}));
}

DropoutResult dropout_add_autograd(const at::Tensor& input, const at::Tensor& residual, double p,
                                   OptionalGenerator generator, const OptionalTensor& distinct) {
  const auto run = [&] { return dropout_add(input, residual, p, generator, distinct); };
  return differentiable(input, {run, {p}}, residual);
}

bool output_says_all(Activation activation) { return activation == Activation::relu; }

Saved saved_for(double p, Activation activation, double parameter) {
  return {.p = p, .activation = activation, .parameter = parameter};
}

DropoutResult act_dropout_autograd(const at::Tensor& input, double p, std::string_view name,
                                   double parameter, OptionalGenerator generator,
                                   const OptionalTensor& distinct) {
  const Activation activation = activation_named(name);
  const auto run = [&] { return act_dropout(input, p, name, parameter, generator, distinct); };
  return differentiable(input, {run, saved_for(p, activation, parameter), false,
                                output_says_all(activation) ? at::Tensor() : input});
}

at::Tensor act_dropout_inplace_autograd(at::Tensor& input, double p, std::string_view name,
                                        double parameter, OptionalGenerator generator) {
  const bool differentiates = needs_grad(input);
  torch::autograd::check_inplace(input, differentiates);
  const Activation activation = activation_named(name);
  const auto run = [&] {
    return DropoutResult(input, act_dropout_(input, p, name, parameter, generator));
  };
  // A copy of the input, with its history.
  const bool copies = differentiates && !output_says_all(activation);
  return std::get<1>(differentiable(input, {run, saved_for(p, activation, parameter), true,
                                            copies ? input.clone() : at::Tensor()}));
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
    const at::Tensor dropped =
        dropout_apply(in_order(grad, order_in_memory(saved)), state, p, false, false, true);
    return gradient_by_torch(dropped, saved, activation, parameter);
  }
  // Linear in grad; `saved` is a constant.
  const auto run = [&] {
    return DropoutResult(act_dropout_backward(grad, saved, state, p, name, parameter), state);
  };
  return std::get<0>(differentiable(grad, {run, saved_for(p, activation, parameter), false,
                                           needs_grad(grad) ? saved.detach() : saved}));
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
