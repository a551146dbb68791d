// Batch normalisation + activation for autograd. A backward that is itself differentiated is a
// composition of torch's operators.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "activation.h"
#include "batch_norm.h"
#include "dense.h"

namespace braze {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The arguments that are no variables.
struct Call {
  const Norm &first, &second;
  bool training, fork;
  Activation activation;
  double parameter;
};

// Variables in the order of the gradients.
enum Variable { kInput, kWeight, kBias, kInput2, kWeight2, kBias2, kResidual, kVariables };
using Variables = std::array<OptionalTensor, kVariables>;

OptionalTensor present(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

ForwardResult call_forward(const Variables& v, const Call& call, bool save_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("braze::batch_norm_act_forward", "")
                             .typed<decltype(batch_norm_act_forward)>();
  const Norm &a = call.first, &b = call.second;
  return op.call(*v[kInput], v[kWeight], v[kBias], a.running_mean, a.running_var,
                 a.num_batches_tracked, a.momentum, a.eps, v[kInput2], v[kWeight2], v[kBias2],
                 b.running_mean, b.running_var, b.num_batches_tracked, b.momentum, b.eps,
                 v[kResidual], call.training, static_cast<int64_t>(call.activation), call.parameter,
                 save_mask);
}

// What the backward must know beside tensors.
struct Kept {
  int64_t given;  // a bit for each variable that there was
  bool residual_saved, training;
  int64_t activation;
  double parameter, eps, eps2;

  // As one list of numbers.
  void save(AutogradContext* ctx) const {
    ctx->saved_data["call"] = std::vector<double>{static_cast<double>(given),
                                                  static_cast<double>(residual_saved),
                                                  static_cast<double>(training),
                                                  static_cast<double>(activation),
                                                  parameter,
                                                  eps,
                                                  eps2};
  }
  static Kept load(AutogradContext* ctx) {
    const std::vector<double> n = ctx->saved_data["call"].toDoubleVector();
    return {static_cast<int64_t>(n[0]),
            n[1] != 0,
            n[2] != 0,
            static_cast<int64_t>(n[3]),
            n[4],
            n[5],
            n[6]};
  }
};

// Another tensor in the same memory, with the same version counter and no other relation to it.
at::Tensor twin(const at::Tensor& tensor) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  return at::Tensor(impl->shallow_copy_and_detach(impl->version_counter(), true));
}

// z of one side, as a differentiable function of x, weight and bias.
at::Tensor normalize_by_torch(const at::Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, const at::Tensor& stats, bool training,
                              double eps) {
  if (training) return at::batch_norm(x, weight, bias, {}, {}, true, 0, eps, false);
  std::vector<int64_t> sizes(static_cast<size_t>(x.dim()), 1);
  sizes[1] = x.size(1);
  const auto wide = [&](const at::Tensor& t) { return t.to(stats.scalar_type()).view(sizes); };
  at::Tensor z = (x.to(stats.scalar_type()) - wide(stats[kMean]) - wide(stats[kMeanLow])) *
                 wide(stats[kInvstd]);
  if (weight) z = z * wide(*weight);
  if (bias) z = z + wide(*bias);
  return z.to(x.scalar_type());
}

class BatchNormAct : public torch::autograd::Function<BatchNormAct> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const OptionalTensor& input,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& input2, const OptionalTensor& weight2,
                               const OptionalTensor& bias2, const OptionalTensor& residual,
                               const Call* call) {
    const Variables v = {input, weight, bias, input2, weight2, bias2, residual};
    auto [y, stats, stats2, mask] = call_forward(v, *call, true);
    // Where the gradient of z's function needs no z, or the mask tells, the residual need not live
    // on.
    const bool z_is_needed = is_curved(call->activation);
    variable_list saved;
    int64_t given = 0;
    for (int i = 0; i < kVariables; ++i) {
      if (!v[i]) continue;
      given |= int64_t{1} << i;
      if (i != kResidual || z_is_needed) saved.push_back(*v[i]);
    }
    saved.insert(saved.end(), {stats, stats2, mask});
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    Kept{given,           residual.has_value() && z_is_needed,
         call->training,  static_cast<int64_t>(call->activation),
         call->parameter, call->first.eps,
         call->second.eps}
        .save(ctx);
    if (call->fork) return {y, twin(y)};
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(kVariables + 1);
    OptionalTensor dy, dy2;
    for (const at::Tensor& grad : grads) {
      if (grad.defined()) (dy ? dy2 : dy) = grad;
    }
    if (!dy) return result;

    const Kept kept = Kept::load(ctx);
    const variable_list saved = ctx->get_saved_variables();
    Variables v;
    std::array<bool, kVariables> wanted = {};
    size_t next = 0, edge = 0;
    for (int i = 0; i < kVariables; ++i) {
      if (!(kept.given >> i & 1)) continue;
      wanted[static_cast<size_t>(i)] = ctx->needs_input_grad(edge++);
      if (i != kResidual || kept.residual_saved) v[static_cast<size_t>(i)] = saved[next++];
    }
    const at::Tensor &stats = saved[next], &stats2 = saved[next + 1], &mask = saved[next + 2];
    const auto activation = static_cast<Activation>(kept.activation);

    if (at::GradMode::is_enabled()) {
      const at::Tensor total = dy2 ? *dy + *dy2 : *dy;
      return differentiable_backward(total, v, wanted, {stats, stats2}, mask, kept,
                                     std::move(result));
    }
    // The residual's gradient is dy itself where nothing stands between them.
    const bool passes_through = wanted[kResidual] && activation == Activation::identity && !dy2;
    if (passes_through) {
      result[kResidual] = *dy;
      wanted[kResidual] = false;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("braze::batch_norm_act_backward", "")
                               .typed<decltype(batch_norm_act_backward)>();
    const auto optional_stats2 = v[kInput2] ? present(stats2) : std::nullopt;
    const auto optional_mask = mask.sym_numel() != 0 ? present(mask) : std::nullopt;
    const std::array<at::Tensor, kVariables> gradients = std::apply(
        [](auto&&... gradient) { return std::array<at::Tensor, kVariables>{gradient...}; },
        op.call(*dy, dy2, *v[kInput], v[kWeight], stats, v[kInput2], v[kWeight2], optional_stats2,
                v[kResidual], optional_mask, kept.training, kept.activation, kept.parameter,
                wanted));
    for (size_t i = 0; i < kVariables; ++i) {
      if (wanted[i]) result[i] = gradients[i];
    }
    for (const int b : {kBias, kBias2}) {  // whose dtype follows an absent weight's otherwise
      const size_t i = static_cast<size_t>(b);
      if (result[i].defined()) result[i] = result[i].to(v[i]->scalar_type());
    }
    return result;
  }

 private:
  static variable_list differentiable_backward(const at::Tensor& dy, const Variables& v,
                                               const std::array<bool, kVariables>& wanted,
                                               const std::array<at::Tensor, 2>& stats,
                                               const at::Tensor& mask, const Kept& kept,
                                               variable_list result) {
    const auto activation = static_cast<Activation>(kept.activation);
    at::AutoGradMode enable(true);
    at::Tensor z =
        normalize_by_torch(*v[kInput], v[kWeight], v[kBias], stats[0], kept.training, kept.eps);
    if (v[kInput2]) {
      z = z + normalize_by_torch(*v[kInput2], v[kWeight2], v[kBias2], stats[1], kept.training,
                                 kept.eps2);
    }
    if (v[kResidual]) z = z + *v[kResidual];
    // With a mask the derivative is piecewise constant: d is linear in dy, and z's value is not
    // needed.
    at::Tensor d;
    if (mask.sym_numel() != 0) {
      d = dy * slopes(mask, *v[kInput], activation, kept.parameter);
    } else {
      d = gradient_by_torch(dy, z, activation, kept.parameter);
    }
    variable_list inputs;
    std::vector<size_t> places;
    for (size_t i = 0; i < kResidual; ++i) {
      if (wanted[i] && v[i]) {
        inputs.push_back(*v[i]);
        places.push_back(i);
      }
    }
    if (!inputs.empty()) {
      const variable_list gradients =
          torch::autograd::grad({z}, inputs, {d}, std::nullopt, true, true);
      for (size_t k = 0; k < places.size(); ++k) result[places[k]] = gradients[k];
    }
    if (wanted[kResidual]) result[kResidual] = d;
    return result;
  }

  // activation'(z) of every element, from its bit.
  static at::Tensor slopes(const at::Tensor& mask, const at::Tensor& x, Activation activation,
                           double parameter);
};

at::Tensor BatchNormAct::slopes(const at::Tensor& mask, const at::Tensor& x, Activation activation,
                                double parameter) {
  const auto [upper, lower] = slopes_of(activation, parameter);
  const ActivationShape shape = *activation_shape(x);
  const int64_t bytes = (shape.row() + 7) / 8;
  const at::Tensor weights = at::pow(2, at::arange(8, mask.options()));
  const at::Tensor bits = mask.view({shape.rows(), bytes, 1}).bitwise_and(weights).ne(0);
  const at::Tensor rows = bits.view({shape.rows(), bytes * 8}).narrow(1, 0, shape.row());
  const at::Tensor in_memory_order = at::where(rows, upper, lower).to(x.scalar_type());
  return in_memory_order.as_strided(x.sizes(), x.strides());
}

// --- arguments ---

bool needs_gradient(const Variables& v) {
  if (!at::GradMode::is_enabled()) return false;
  for (const OptionalTensor& tensor : v) {
    if (tensor && tensor->requires_grad()) return true;
  }
  return false;
}

std::pair<at::Tensor, at::Tensor> run(Variables v, const Call& call) {
  // In here, so that what is saved for the backward pass is what the kernels read. Traced shapes
  // are no numbers; the kernels make their own copy then.
  const at::Tensor& input = *v[kInput];
  const bool saves = needs_gradient(v);
  if (saves && input.dim() >= 2 && input.layout() == c10::kStrided &&
      !input.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    v[kInput] = dense_activation(input).tensor;
  }
  if (v[kResidual] && v[kResidual]->sym_sizes() != v[kInput]->sym_sizes()) {
    v[kResidual] = v[kResidual]->expand_symint(v[kInput]->sym_sizes());
  }
  if (!saves) {
    const at::Tensor y = std::get<0>(call_forward(v, call, false));
    return {y, call.fork ? twin(y) : at::Tensor()};
  }
  const variable_list y = BatchNormAct::apply(v[0], v[1], v[2], v[3], v[4], v[5], v[6], &call);
  return {y[0], call.fork ? y[1] : at::Tensor()};
}

// bn(input) + other, of one dtype: that of torch's addition.
void promote(Variables& v, Variable other) {
  const OptionalTensor& second = v[other];
  if (!second || second->scalar_type() == v[kInput]->scalar_type()) return;
  const c10::ScalarType dtype = c10::promoteTypes(v[kInput]->scalar_type(), second->scalar_type());
  v[kInput] = v[kInput]->to(dtype);
  v[other] = second->to(dtype);
  // Kernels take parameters in fp32 beside 16-bit tensors, else in the tensors' own dtype.
  for (const Variable vector : {kWeight, kBias, kWeight2, kBias2}) {
    if (v[vector] && (v[vector]->scalar_type() != c10::kFloat || dtype == c10::kDouble)) {
      v[vector] = v[vector]->to(dtype);
    }
  }
}

}  // namespace

namespace {

std::pair<at::Tensor, at::Tensor> act(const at::Tensor& input, const Norm& norm, bool training,
                                      std::string_view activation, double parameter,
                                      const OptionalTensor& residual, bool fork) {
  const OptionalTensor none;
  const Norm no_norm{none, none, none, none, none, std::nullopt, 0};
  Variables v = {input, norm.weight, norm.bias, none, none, none, residual};
  promote(v, kResidual);
  return run(std::move(v),
             {norm, no_norm, training, fork, activation_named(activation), parameter});
}

std::pair<at::Tensor, at::Tensor> add_act(const at::Tensor& input, const Norm& norm,
                                          const at::Tensor& input2, const Norm& norm2,
                                          bool training, std::string_view activation,
                                          double parameter, bool fork) {
  Variables v = {input, norm.weight, norm.bias, input2, norm2.weight, norm2.bias, std::nullopt};
  promote(v, kInput2);
  return run(std::move(v), {norm, norm2, training, fork, activation_named(activation), parameter});
}

}  // namespace

at::Tensor batch_norm_act(const at::Tensor& input, BRAZE_NORM_PARAMETERS(), bool training,
                          std::string_view activation, double parameter,
                          const OptionalTensor& residual) {
  return act(input, BRAZE_NORM(), training, activation, parameter, residual, false).first;
}

Fork batch_norm_act_fork(const at::Tensor& input, BRAZE_NORM_PARAMETERS(), bool training,
                         std::string_view activation, double parameter,
                         const OptionalTensor& residual) {
  return act(input, BRAZE_NORM(), training, activation, parameter, residual, true);
}

at::Tensor batch_norm_add_act(const at::Tensor& input, BRAZE_NORM_PARAMETERS(),
                              const at::Tensor& input2, BRAZE_NORM_PARAMETERS(2), bool training,
                              std::string_view activation, double parameter) {
  return add_act(input, BRAZE_NORM(), input2, BRAZE_NORM(2), training, activation, parameter, false)
      .first;
}

Fork batch_norm_add_act_fork(const at::Tensor& input, BRAZE_NORM_PARAMETERS(),
                             const at::Tensor& input2, BRAZE_NORM_PARAMETERS(2), bool training,
                             std::string_view activation, double parameter) {
  return add_act(input, BRAZE_NORM(), input2, BRAZE_NORM(2), training, activation, parameter, true);
}

TORCH_LIBRARY_FRAGMENT(braze, m) {
  const std::string norm = "Tensor input, " + norm_schema("", 'a');
  const std::string act = norm +
                          ", bool training, str activation, float parameter, "
                          "Tensor? residual) -> ";
  const std::string add_act = norm + ", Tensor input2, " + norm_schema("2", 'd') +
                              ", bool training, str activation, float parameter) -> ";
  m.def(("batch_norm_act(" + act + "Tensor").c_str(), batch_norm_act);
  m.def(("batch_norm_act_fork(" + act + "(Tensor, Tensor)").c_str(), batch_norm_act_fork);
  m.def(("batch_norm_add_act(" + add_act + "Tensor").c_str(), batch_norm_add_act);
  m.def(("batch_norm_add_act_fork(" + add_act + "(Tensor, Tensor)").c_str(),
        batch_norm_add_act_fork);
}

}  // namespace braze
