#include "work.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "../../cpu/optimizer_cpu.h"

namespace braze {
namespace {

// A step shorter than this keeps the GIL: letting go costs more than it gives to other threads.
constexpr int64_t kReleaseGilCost = 1 << 18;

double read_count(const SeenTensor& entry) {
  return entry.dtype == c10::ScalarType::Float ? *static_cast<const float*>(entry.data)
                                               : *static_cast<const double*>(entry.data);
}

void write_count(const SeenTensor& entry, double value) {
  if (entry.dtype == c10::ScalarType::Float) {
    *static_cast<float*>(const_cast<void*>(entry.data)) = static_cast<float>(value);
  } else {
    *static_cast<double*>(const_cast<void*>(entry.data)) = value;
  }
}

Operand operand_of(const SeenTensor& entry) {
  if (entry.tensor == nullptr) return {};
  return {const_cast<void*>(entry.data), nullptr, *real_dtype(entry.dtype)};
}

}  // namespace

void DeviceWork::release() {
  active = {};
  held_.clear();
}

DeviceScalar DeviceWork::scalar_for(const at::Tensor& param, const at::Tensor* tensor) {
  if (tensor == nullptr) return {};
  if (tensor->device() != param.device() || tensor->is_complex() ||
      !real_dtype(tensor->scalar_type())) {
    held_.push_back(tensor->to(param.device(), c10::kDouble, /*non_blocking=*/true));
    tensor = &held_.back();
  }
  return {tensor->const_data_ptr(), *real_dtype(tensor->scalar_type())};
}

void DeviceWork::choose_hypers(const Parameters& parameters, const StepScalars& scalars,
                               bool repeating) {
  if (active.empty()) return;
  const RuleInfo& rule = parameters.rule;
  if (!repeating) {
    counts_on_device_ = false;
    for (Active& a : active) {
      const bool on_device = parameters.counts_on_device(*a.slot);
      a.counted = rule.counts_steps && !on_device;
      counts_on_device_ |= on_device;
    }
  }
  const std::vector<GroupReader>& readers = parameters.readers();
  made_on_device_ =
      !on_cpu() && (scalars.amp.grad_scale != nullptr || scalars.amp.found_inf != nullptr ||
                    counts_on_device_ || (scalars.norm_on_device && scalars.norm_decides()) ||
                    std::any_of(readers.begin(), readers.end(),
                                [](const GroupReader& r) { return r.options().any_tensor; }));
  if (table_ == nullptr) table_ = rule.make_table();
  table_->clear(made_on_device_);
  int32_t rows = 0;
  HyperKey last;
  for (Active& a : active) {
    const Slot& slot = *a.slot;
    a.step = a.counted ? read_count(slot.step) + 1 : 0;
    const HyperKey key{slot.group, a.step, slot.in_window, slot.has_sum()};
    if (key != last) {
      last = key;
      const GroupOptions& options = parameters.options(slot);
      const StepInputs inputs{.step = a.step,
                              .grad_scale = (key.has_sum ? 1 : scalars.grad_scale) /
                                            scalars.divisor * scalars.coefficient,
                              .fold_weight = scalars.grad_scale,
                              .in_window = slot.in_window};
      if (made_on_device_) {
        std::array<DeviceScalar, kMaxDeviceFields> fields;
        for (size_t j = 0; j < fields.size(); ++j) {
          fields[j] = scalar_for(*slot.param.tensor, options.tensors[j]);
        }
        table_->add(options.values, inputs, fields.data());
      } else {
        const bool known = !options.any_tensor;
        table_->add(known ? options.values : with_values(options, rule).values, inputs, nullptr);
      }
      ++rows;
    }
    a.hyper = rows - 1;
  }
}

void DeviceWork::choose_hypers(const Parameters& parameters, const Destination& destination,
                               double weight) {
  folds_.clear();
  for (Active& a : active) {
    Fold::Options fold{.weight = weight, .keep = 1};
    if (sums_in_state(parameters, *a.slot, destination)) {
      const GroupOptions options = with_values(parameters.options(*a.slot), parameters.rule);
      const Fold::Options first = parameters.rule.sum_in_state(options.values);
      fold.weight *= first.weight;
      if (!a.slot->in_window) fold.keep = first.keep;
    }
    if (folds_.empty() || folds_.back().d.weight != fold.weight ||
        folds_.back().d.keep != fold.keep) {
      folds_.push_back(make_hyper<Fold>(fold, {}));
    }
    a.hyper = static_cast<int32_t>(folds_.size()) - 1;
  }
}

void DeviceWork::fill(const Parameters& parameters, const Destination& destination,
                      bool repeating) {
  const auto refill = [&] {
    for (size_t i = 0; i < active.size(); ++i) {
      TensorWork& work = tensors_[i];
      work.hyper = active[i].hyper;
      work.first = active[i].first;
      work.first_average = active[i].first_average;
      if (active[i].grad != nullptr) work.grad = linear_operand(*active[i].grad);
    }
  };
  if (repeating) {
    refill();
    return;
  }
  bool all_linear = true;
  new_key_.build = parameters.builds;
  new_key_.destination = destination;
  new_key_.tensors.clear();
  for (const Active& a : active) {
    all_linear = all_linear && a.linear;
    new_key_.tensors.push_back({.slot = parameters.index_of(*a.slot),
                                .states = parameters.options(*a.slot).states,
                                .counted = a.counted,
                                .linear = a.linear,
                                .has_grad = a.grad != nullptr,
                                .has_sum = a.slot->has_sum()});
  }
  if (all_linear && new_key_ == key_) {
    refill();
    return;
  }
  layouts_.clear();
  tensors_.resize(active.size());
  for (size_t i = 0; i < active.size(); ++i) {
    fill_tensor(parameters, tensors_[i], active[i], destination);
  }
  if (on_cpu()) chunks_.build(tensors_);
  std::swap(key_, new_key_);
  ++generation_;
}

void DeviceWork::fill_tensor(const Parameters& parameters, TensorWork& work, const Active& a,
                             const Destination& destination) {
  const Slot& slot = *a.slot;
  const SeenTensor none;
  const SeenTensor* states[kMaxStates] = {&none, &none, &none};
  if (destination.fold) {
    states[0] = sums_in_state(parameters, slot, destination) ? &slot.state[0] : &slot.sum;
  } else {
    const uint32_t used = parameters.options(slot).states;
    for (size_t k = 0; k < kMaxStates; ++k) {
      if (used >> k & 1) states[k] = &slot.state[k];
    }
  }
  const SeenTensor& sum = destination.fold ? none : slot.sum;
  const SeenTensor& average = destination.averages ? slot.average : none;
  work.step = destination.fold || a.counted ? Operand{} : operand_of(slot.step);
  work.hyper = a.hyper;
  work.first = a.first;
  work.first_average = a.first_average;
  work.is_double = slot.real == DType::f64;
  work.linear = a.linear;
  if (work.linear) {
    work.numel = slot.numel;
    work.param = operand_of(slot.param);
    work.grad = a.grad == nullptr ? Operand{} : linear_operand(*a.grad);
    work.sum = operand_of(sum);
    work.average = operand_of(average);
    for (size_t k = 0; k < kMaxStates; ++k) work.state[k] = operand_of(*states[k]);
    return;
  }
  std::vector<NamedOperand> operands = {{slot.param.tensor, &work.param},
                                        {a.grad, &work.grad},
                                        {sum.tensor, &work.sum},
                                        {average.tensor, &work.average}};
  for (size_t k = 0; k < kMaxStates; ++k) {
    operands.push_back({states[k]->tensor, &work.state[k]});
  }
  lay_out(work, operands, layouts_);
}

// A short call keeps the GIL.
template <class Body>
void DeviceWork::without_gil(const Body& body) {
  if (chunks_.cost < kReleaseGilCost) return body();
  for (const Active& a : active) {
    if (a.grad != nullptr) held_.push_back(*a.grad);
  }
  const GilReleased released;
  body();
}

Hypers DeviceWork::hypers(const Destination& destination, const StepScalars& scalars) const {
  Hypers result = destination.fold ? view_of(folds_) : table_->view();
  result.average_weight = scalars.average_weight;
  return result;
}

DeviceStep& DeviceWork::device_step(const Parameters& parameters) {
  if (!step_) step_ = place_.backend->make_step(place_.index, parameters.owner);
  return *step_;
}

const at::Tensor* DeviceWork::here(const at::Tensor* tensor) {
  const c10::Device device = active.front().slot->param.tensor->device();
  if (tensor == nullptr || tensor->device() == device) return tensor;
  held_.push_back(tensor->to(device, tensor->scalar_type(), /*non_blocking=*/true));
  return &held_.back();
}

double DeviceWork::measure_on_cpu(const StepScalars& scalars) {
  double squares = 0;
  without_gil([&] {
    squares = cpu::measure_gradients(tensors_, chunks_, scalars.measured_weight(),
                                     scalars.statistics, at::get_num_threads(), sums_);
  });
  return squares;
}

Measured DeviceWork::measure_on_device(const Parameters& parameters, const StepScalars& scalars) {
  DeviceScale scale{.grad_scale = here(scalars.amp.grad_scale)};
  scale.norm_scale = scalars.norm_scale();
  scale.statistics = scalars.statistics;
  return device_step(parameters)
      .measure({tensors_, generation_}, hypers({}, scalars), scalars.measured_weight(), scale);
}

void DeviceWork::launch(const Parameters& parameters, const Destination& destination,
                        const StepScalars& scalars, DeviceScale scale) {
  if (active.empty()) return;
  const Hypers table = hypers(destination, scalars);
  if (on_cpu()) {
    launched = true;
    GradientSums* const sums = scalars.statistics ? sums_.data() : nullptr;
    without_gil(
        [&] { cpu::update_tensors(tensors_, chunks_, table, at::get_num_threads(), sums); });
    return;
  }
  scale.grad_scale = here(scalars.amp.grad_scale);
  scale.found_inf = here(scalars.amp.found_inf);
  scale.squares = here(scale.squares);
  scale.norm_scale = scalars.norm_scale();
  scale.statistics = scalars.statistics;
  device_step(parameters).launch({tensors_, generation_}, table, scale);
  launched = true;
}

std::vector<std::pair<size_t, GradientSums>> DeviceWork::sums() {
  std::vector<GradientSums> of_tensor(tensors_.size());
  if (!on_cpu()) {
    if (step_) of_tensor = step_->sums();
  } else {
    for (size_t c = 0; c < sums_.size(); ++c) {
      of_tensor[static_cast<size_t>(chunks_.chunks[c].tensor)] += sums_[c];
    }
  }
  std::vector<std::pair<size_t, GradientSums>> result;
  for (size_t i = 0; i < std::min(of_tensor.size(), key_.tensors.size()); ++i) {
    result.emplace_back(key_.tensors[i].slot, of_tensor[i]);
  }
  return result;
}

void DeviceWork::count_step() const {
  for (const Active& a : active) {
    if (a.counted) write_count(a.slot->step, a.step);
    a.slot->param.tensor->unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace braze
