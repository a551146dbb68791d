// StepPlan, part 3: what the formulas need, computed in double once per (group, step count).
#include <ATen/Functions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <limits>

#include "step_plan_active.h"

namespace braze {

// For a kernel of this batch to read.
DeviceScalar StepPlan::device_scalar(const Batch& batch, PyObject* option) {
  if (option == nullptr) return {};
  const at::Tensor* tensor = &THPVariable_Unpack(option);
  const at::Tensor& param = THPVariable_Unpack(active_[batch.begin].slot->param.object);
  if (tensor->device() != param.device() || tensor->is_complex() ||
      !real_dtype(tensor->scalar_type())) {
    held_.push_back(tensor->to(param.device(), c10::kDouble, /*non_blocking=*/true));
    tensor = &held_.back();
  }
  return {tensor->const_data_ptr(), *real_dtype(tensor->scalar_type())};
}

namespace {

// An option that stands in device memory, for a step on the CPU.
double value_of(double number, PyObject* option) {
  return option == nullptr ? number : THPVariable_Unpack(option).item().toDouble();
}

}  // namespace

AdamRule StepPlan::adam_rule(const GroupOptions& o) const {
  return {o.lr,
          o.beta1,
          o.beta2,
          o.eps,
          o.weight_decay,
          o.l1,
          o.maximize ? -1.0 : 1.0,
          o.decoupled_weight_decay};
}

SgdRule StepPlan::sgd_rule(const GroupOptions& o) const {
  return {o.lr, o.weight_decay, o.l1, o.momentum, o.dampening, o.maximize ? -1.0 : 1.0};
}

int32_t StepPlan::adam_hyper(Batch& batch, const Active& active, const StepScalars& scalars) {
  const GroupOptions& o = options_[static_cast<size_t>(active.slot->group)];
  const bool has_sum = active.slot->sum.object != nullptr;
  const bool any = !batch.adam.empty() || !batch.adam_device.empty();
  HyperKey key{active.slot->group, active.step, has_sum};
  const size_t count = batch.device_hypers ? batch.adam_device.size() : batch.adam.size();
  if (any && key == last_key_) return static_cast<int32_t>(count) - 1;
  last_key_ = key;
  const double grad_scale = (has_sum ? 1 : scalars.grad_scale) / scalars.divisor;
  AdamRule rule = adam_rule(o);
  if (batch.device_hypers) {
    batch.adam_device.push_back(
        {rule, active.step, grad_scale, scalars.grad_scale, device_scalar(batch, o.device.lr),
         device_scalar(batch, o.device.beta1), device_scalar(batch, o.device.beta2),
         device_scalar(batch, o.device.weight_decay), o.amsgrad});
    return static_cast<int32_t>(count);
  }
  rule.lr = value_of(rule.lr, o.device.lr);
  rule.beta1 = value_of(rule.beta1, o.device.beta1);
  rule.beta2 = value_of(rule.beta2, o.device.beta2);
  rule.weight_decay = value_of(rule.weight_decay, o.device.weight_decay);
  if (rule.beta1 != power_.beta1 || rule.beta2 != power_.beta2 || active.step != power_.step) {
    const bool whole = active.step == std::floor(active.step);
    const auto correction = whole ? bias_correction : fractional_bias_correction;
    power_ = {rule.beta1, rule.beta2, active.step, correction(rule.beta1, rule.beta2, active.step)};
  }
  const AdamArgs<double> d = adam_args(rule, power_.correction, grad_scale, scalars.grad_scale);
  batch.adam.push_back({round_args<float>(d), d, d.l2 != 0 || d.l1 != 0, o.amsgrad});
  return static_cast<int32_t>(count);
}

int32_t StepPlan::sgd_hyper(Batch& batch, const Active& active, const StepScalars& scalars) {
  const GroupOptions& o = options_[static_cast<size_t>(active.slot->group)];
  const bool has_sum = active.slot->sum.object != nullptr;
  const bool any = !batch.sgd.empty() || !batch.sgd_device.empty();
  const bool decayed = active.slot->in_window;
  HyperKey key{active.slot->group, decayed ? 1.0 : 0.0, has_sum};
  const size_t count = batch.device_hypers ? batch.sgd_device.size() : batch.sgd.size();
  if (any && key == last_key_) return static_cast<int32_t>(count) - 1;
  last_key_ = key;
  const double grad_scale = (has_sum ? 1 : scalars.grad_scale) / scalars.divisor;
  SgdRule rule = sgd_rule(o);
  if (batch.device_hypers) {
    batch.sgd_device.push_back(
        {rule, grad_scale, scalars.grad_scale, device_scalar(batch, o.device.lr),
         device_scalar(batch, o.device.weight_decay), device_scalar(batch, o.device.momentum),
         device_scalar(batch, o.device.dampening), decayed, o.momentum != 0, o.nesterov});
    return static_cast<int32_t>(count);
  }
  rule.lr = value_of(rule.lr, o.device.lr);
  rule.weight_decay = value_of(rule.weight_decay, o.device.weight_decay);
  rule.momentum = value_of(rule.momentum, o.device.momentum);
  rule.dampening = value_of(rule.dampening, o.device.dampening);
  const SgdArgs<double> d = sgd_args(rule, decayed, grad_scale, scalars.grad_scale);
  batch.sgd.push_back(
      {round_args<float>(d), d, d.l2 != 0 || d.l1 != 0, rule.momentum != 0, o.nesterov});
  return static_cast<int32_t>(count);
}

}  // namespace braze
