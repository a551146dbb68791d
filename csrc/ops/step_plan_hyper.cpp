// StepPlan, part 3: what the formulas need, computed in double once per (group, step count).
#include <cmath>

#include "step_plan_active.h"

namespace braze {

int32_t StepPlan::adam_hyper(const Active& active, const StepScalars& scalars) {
  const GroupOptions& o = options_[static_cast<size_t>(active.slot->group)];
  const bool has_sum = active.slot->sum.object != nullptr;
  HyperKey key{active.slot->group, active.step, has_sum};
  if (!adam_.empty() && key == last_key_) return static_cast<int32_t>(adam_.size()) - 1;
  last_key_ = key;
  const double sign = o.maximize ? -1 : 1;
  if (o.beta1 != power_.beta1 || o.beta2 != power_.beta2 || active.step != power_.step) {
    power_ = {o.beta1, o.beta2, active.step, 1 - std::pow(o.beta1, active.step),
              1 / std::sqrt(1 - std::pow(o.beta2, active.step))};
  }
  AdamArgs<double> d;
  d.grad_scale = sign * (has_sum ? 1 : scalars.grad_scale) / scalars.divisor;
  d.fold_weight = scalars.grad_scale;
  d.beta1 = o.beta1;
  d.one_minus_beta1 = 1 - o.beta1;
  d.beta2 = o.beta2;
  d.one_minus_beta2 = 1 - o.beta2;
  d.l2 = o.decoupled_weight_decay ? 0 : o.weight_decay;
  d.l1 = o.l1;
  d.param_decay = o.decoupled_weight_decay ? 1 - o.lr * o.weight_decay : 1;
  d.step_size = o.lr / power_.correction1;
  d.inv_sqrt_correction2 = power_.inv_sqrt_correction2;
  d.eps = o.eps;
  adam_.push_back({round_args<float>(d), d, d.l2 != 0 || d.l1 != 0, o.amsgrad});
  return static_cast<int32_t>(adam_.size()) - 1;
}

int32_t StepPlan::sgd_hyper(const Active& active, const StepScalars& scalars) {
  const GroupOptions& o = options_[static_cast<size_t>(active.slot->group)];
  const bool has_sum = active.slot->sum.object != nullptr;
  HyperKey key{active.slot->group, active.slot->in_window ? 1.0 : 0.0, has_sum};
  if (!sgd_.empty() && key == last_key_) return static_cast<int32_t>(sgd_.size()) - 1;
  last_key_ = key;
  const double sign = o.maximize ? -1 : 1;
  SgdArgs<double> d;
  d.grad_scale = sign * (has_sum ? 1 : scalars.grad_scale) / scalars.divisor;
  d.fold_weight = scalars.grad_scale;
  d.l2 = o.weight_decay;
  d.l1 = o.l1;
  // The buffer was decayed when the window's first gradient was folded into it.
  d.momentum = active.slot->in_window ? 1 : o.momentum;
  d.one_minus_dampening = active.slot->in_window ? 1 : 1 - o.dampening;
  d.lr = o.lr;
  sgd_.push_back({round_args<float>(d), d, d.l2 != 0 || d.l1 != 0, o.momentum != 0, o.nesterov});
  return static_cast<int32_t>(sgd_.size()) - 1;
}

}  // namespace braze
