// StepPlan, part 2: one call, from gradients to launches. Everything that can fail comes before the
// first write.
#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "step_plan_active.h"

namespace braze {
namespace {

double read_step(const SeenTensor& entry) {
  return entry.dtype == c10::ScalarType::Float ? *static_cast<const float*>(entry.data)
                                               : *static_cast<const double*>(entry.data);
}

void write_step(const SeenTensor& entry, double value) {
  if (entry.dtype == c10::ScalarType::Float) {
    *static_cast<float*>(const_cast<void*>(entry.data)) = static_cast<float>(value);
  } else {
    *static_cast<double*>(const_cast<void*>(entry.data)) = value;
  }
}

// A mode that watches operators (make_fx, a FakeTensor, a counter) must see those of the step.
bool watched() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

}  // namespace

// For a gradient that differs from its parameter in more than strides. Empty if the kernels can use
// it.
std::string StepPlan::admit_unusual(Active& active, const at::Tensor& param,
                                    const at::Tensor& grad) {
  const Slot& slot = *active.slot;
  if (grad.layout() != c10::kStrided) return "sparse";
  if (grad.key_set().has(c10::DispatchKey::Python)) return "subclass";
  TORCH_CHECK_VALUE(grad.device() == param.device(), owner_, ": the gradient of ", name_of(slot),
                    " must be on the parameter's device ", param.device(), ", got ", grad.device());
  TORCH_CHECK_VALUE(grad.sizes() == param.sizes(), owner_, ": the gradient of ", name_of(slot),
                    " must have the parameter's shape ", param.sizes(), ", got ", grad.sizes());
  TORCH_CHECK_TYPE(real_dtype(grad.scalar_type()) && grad.is_complex() == param.is_complex(),
                   owner_, ": the gradient of ", name_of(slot), " has dtype ", grad.scalar_type(),
                   ", which cannot go with a parameter of dtype ", param.scalar_type());
  if (!is_plain(grad)) {
    held_.push_back(grad.resolve_conj().resolve_neg());
    active.grad = &held_.back();
    if (!is_plain(*active.grad)) return "subclass";
  }
  active.linear = same_order(param, *active.grad);
  return "";
}

// What of a group's options decides which state its parameters need and whether they step here.
uint8_t StepPlan::shape_of(const GroupOptions& options) const {
  return static_cast<uint8_t>(num_states(options) | options.differentiable << 4 |
                              options.on_device << 5);
}

void StepPlan::settle() {
  settled_build_ = rebuilds_;
  settled_findings_.resize(slots_.size());
  for (size_t i = 0; i < slots_.size(); ++i) settled_findings_[i] = gathered_[i].finding;
  settled_groups_.clear();
  for (const GroupOptions& o : options_) settled_groups_.push_back(shape_of(o));
}

// True if this step works on the same tensors in the same way as the last one. Most do.
bool StepPlan::repeats() {
  if (settled_build_ != rebuilds_ || settled_findings_.size() != slots_.size() ||
      settled_groups_.size() != options_.size()) {
    return false;
  }
  for (size_t g = 0; g < options_.size(); ++g) {
    if (shape_of(options_[g]) != settled_groups_[g]) return false;
  }
  bool same = true;
  for (size_t i = 0; i < slots_.size(); ++i) same &= gathered_[i].finding == settled_findings_[i];
  return same;
}

void StepPlan::check_gradient(const Slot& slot, const at::Tensor& grad) const {
  if (slot.numel == 0) return;
  TORCH_CHECK_VALUE(slot.param.data != nullptr && grad.const_data_ptr() != nullptr, owner_,
                    ": the memory of ", name_of(slot), " or of its gradient has been freed");
  refuse_overlapping_gradient(slot, grad);
}

std::string StepPlan::collect(bool include_window, bool may_repeat) {
  held_.clear();
  repeating_ = may_repeat && repeats();
  settled_findings_.clear();  // until this step has come to its end
  if (repeating_) {
    for (Active& active : active_) {
      active.grad = gathered_[static_cast<size_t>(active.slot - slots_.data())].grad;
      check_gradient(*active.slot, *active.grad);
    }
    return "";
  }
  active_.clear();
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    const Gathered& gathered = gathered_[i];
    if (gathered.finding == Finding::no_gradient) {
      if (include_window && (slot.sum.object != nullptr || slot.in_window)) {
        active_.push_back({&slot, nullptr, slot.linear, false, 0, 0});
      }
      continue;
    }
    if (slot.obstacle != nullptr) {
      const bool cuda = std::string(slot.obstacle) == "cuda";
      return cuda ? THPVariable_Unpack(slot.param.object).device().str() : slot.obstacle;
    }
    if (options_[static_cast<size_t>(slot.group)].differentiable) return "differentiable";
    TORCH_CHECK(
        !THPVariable_Unpack(slot.param.object).is_inference() || c10::InferenceMode::is_enabled(),
        "Inplace update to inference tensor outside InferenceMode is not allowed: ", owner_,
        " cannot update ", name_of(slot), "; make the parameter outside torch.inference_mode()");
    active_.push_back({&slot, gathered.grad, gathered.finding == Finding::usual, false, 0, 0});
    Active& active = active_.back();
    active.repeatable = gathered.finding == Finding::usual && slot.linear &&
                        slot.sum.object == nullptr && !slot.in_window &&
                        !THPVariable_Unpack(slot.param.object).is_inference();
    if (gathered.finding == Finding::unusual) {
      const at::Tensor& param = THPVariable_Unpack(slot.param.object);
      if (std::string reason = admit_unusual(active, param, *gathered.grad); !reason.empty()) {
        return reason;
      }
    }
    active.linear = active.linear && slot.linear;
    check_gradient(slot, *active.grad);
  }
  return "";
}

// Active slots of one device side by side, and each batch's share of them.
void StepPlan::arrange_batches() {
  if (repeating_) return;
  const auto before = [](const Active& a, const Active& b) {
    return a.slot->batch < b.slot->batch;
  };
  if (!std::is_sorted(active_.begin(), active_.end(), before)) {
    std::stable_sort(active_.begin(), active_.end(), before);
  }
  for (Batch& batch : batches_) batch.begin = batch.end = 0;
  for (size_t i = 0; i < active_.size(); ++i) {
    Batch& batch = batches_[static_cast<size_t>(active_[i].slot->batch)];
    if (batch.end == 0) batch.begin = i;
    batch.end = i + 1;
  }
}

// A graph replays the launch, not this code: nothing that changes from step to step may be decided
// here.
void StepPlan::check_capture() const {
  for (const Batch& batch : batches_) {
    if (batch.begin == batch.end || batch.place.backend == nullptr ||
        !batch.place.backend->is_capturing(batch.place.index)) {
      continue;
    }
    const bool counted = std::any_of(active_.begin() + static_cast<ptrdiff_t>(batch.begin),
                                     active_.begin() + static_cast<ptrdiff_t>(batch.end),
                                     [](const Active& active) { return active.counted; });
    TORCH_CHECK(
        !counted, "Attempting CUDA graph capture of step() for an instance of ", owner_,
        " whose step counts the CPU keeps: param_groups' capturable is False. Construct it ",
        "with capturable=True");
  }
}

// Adam's step count of this slot, present or still to be made, is in the memory of its device.
bool StepPlan::counts_on_device(const Slot& slot) const {
  const Batch& batch = batches_[static_cast<size_t>(slot.batch)];
  if (batch.place.backend == nullptr || algorithm_ != Algorithm::adam) return false;
  const bool wanted = options_[static_cast<size_t>(slot.group)].on_device;
  if (slot.step.object == nullptr) return wanted;
  return batch.place.backend->holds_scalar(THPVariable_Unpack(slot.step.object), wanted);
}

// A GradScaler's tensors stay on the device if every kernel can read them and no later decision
// hangs on them here; otherwise their values are waited for. False if they tell of an overflow.
bool StepPlan::resolve_loss_scale(StepScalars& scalars, bool window) {
  if (scalars.amp.grad_scale == nullptr && scalars.amp.found_inf == nullptr) return true;
  const auto readable = [](const at::Tensor* tensor) {
    return tensor == nullptr ||
           (tensor->scalar_type() == c10::ScalarType::Float && tensor->numel() == 1);
  };
  bool deferred = !window && readable(scalars.amp.grad_scale) && readable(scalars.amp.found_inf);
  for (const Active& active : active_) {
    const Slot& slot = *active.slot;
    const bool momentum = options_[static_cast<size_t>(slot.group)].momentum != 0;
    // A first momentum buffer starts as the gradient, of the first step that is not skipped.
    deferred = deferred && batches_[static_cast<size_t>(slot.batch)].place.backend != nullptr &&
               (algorithm_ == Algorithm::adam ? counts_on_device(slot)
                                              : !momentum || slot.state[0].object != nullptr);
  }
  if (deferred) return true;
  if (scalars.amp.found_inf != nullptr && scalars.amp.found_inf->item().toDouble() != 0)
    return false;
  if (scalars.amp.grad_scale != nullptr) {
    scalars.grad_scale = 1 / scalars.amp.grad_scale->item().toDouble();
  }
  scalars.amp = {};
  return true;
}

void StepPlan::choose_hypers(const StepScalars& scalars) {
  for (Batch& batch : batches_) {
    batch.adam.clear();
    batch.sgd.clear();
    batch.adam_device.clear();
    batch.sgd_device.clear();
    if (!repeating_) {
      batch.counts_on_device = false;
      for (size_t i = batch.begin; i < batch.end; ++i) {
        const bool on_device = counts_on_device(*active_[i].slot);
        active_[i].counted = algorithm_ == Algorithm::adam && !on_device;
        batch.counts_on_device |= on_device;
      }
    }
    batch.device_hypers = batch.place.backend != nullptr &&
                          (scalars.amp.grad_scale != nullptr || scalars.amp.found_inf != nullptr ||
                           batch.counts_on_device ||
                           std::any_of(options_.begin(), options_.end(),
                                       [](const GroupOptions& o) { return o.device.any(); }));
    for (size_t i = batch.begin; i < batch.end; ++i) {
      Active& active = active_[i];
      if (algorithm_ == Algorithm::adam) {
        active.step = active.counted ? read_step(active.slot->step) + 1 : 0;
        active.hyper = adam_hyper(batch, active, scalars);
      } else {
        active.hyper = sgd_hyper(batch, active, scalars);
      }
    }
  }
}

std::string StepPlan::step(PyObject* groups, PyObject* state, StepScalars scalars) {
  if (watched()) return "mode";
  Guard guard(*this);
  refresh(groups, state);
  const bool window = scalars.window_weight >= 0;
  if (std::string reason = collect(window, !window); !reason.empty()) return reason;
  const bool present = std::any_of(active_.begin(), active_.end(),
                                   [](const Active& active) { return active.grad != nullptr; });
  if (active_.empty()) return "none";
  if (window && scalars.mean) {
    scalars.divisor = scalars.window_weight + (present || scalars.counts ? 1 : 0);
    TORCH_CHECK_VALUE(scalars.divisor != 0, owner_,
                      ": the weights of the accumulated gradients sum to 0");
  }
  arrange_batches();
  if (!resolve_loss_scale(scalars, window)) return "overflow";
  const bool deferred = scalars.amp.found_inf != nullptr;
  undo_state_on_failure(state, [&] {
    if (!repeating_) create_state(groups, state, false, false);
    choose_hypers(scalars);
    check_capture();
    for (Batch& batch : batches_) fill_work(batch, {});
    for (Batch& batch : batches_) {
      launch_step(batch, scalars);
      for (size_t i = batch.begin; i < batch.end; ++i) {
        const Slot& slot = *active_[i].slot;
        if (active_[i].counted) write_step(slot.step, active_[i].step);
        THPVariable_Unpack(slot.param.object).unsafeGetTensorImpl()->bump_version();
      }
    }
  });
  if (window) leave_window(groups, state);
  const bool settled = !window && std::all_of(active_.begin(), active_.end(), [](const Active& a) {
    return a.repeatable && !a.first;
  });
  if (settled) settle();
  return deferred ? "deferred" : "";
}

std::string StepPlan::fold(PyObject* groups, PyObject* state, double weight, bool into_momentum) {
  if (watched()) return "mode";
  Guard guard(*this);
  refresh(groups, state);
  if (std::string reason = collect(false, false); !reason.empty()) return reason;
  if (active_.empty()) return "none";
  arrange_batches();
  for (const Batch& batch : batches_) {
    TORCH_CHECK(batch.begin == batch.end || batch.place.backend == nullptr ||
                    !batch.place.backend->is_capturing(batch.place.index),
                owner_,
                ": accumulation counts its micro-batches on the CPU and cannot be captured ",
                "into a CUDA graph");
  }
  undo_state_on_failure(state, [&] {
    create_state(groups, state, true, into_momentum);
    for (Batch& batch : batches_) {
      batch.fold.clear();
      for (size_t i = batch.begin; i < batch.end; ++i) {
        Active& active = active_[i];
        const GroupOptions& o = options_[static_cast<size_t>(active.slot->group)];
        const bool to_momentum = folds_into_momentum(*active.slot, into_momentum);
        // A buffer carries the sign of the update direction; an accumulator carries the gradient
        // itself.
        const double signed_weight = to_momentum && o.maximize ? -weight : weight;
        const double momentum = o.device.momentum == nullptr
                                    ? o.momentum
                                    : THPVariable_Unpack(o.device.momentum).item().toDouble();
        const double keep = to_momentum && !active.slot->in_window ? momentum : 1;
        const FoldHyper hyper{signed_weight, keep};
        if (batch.fold.empty() || batch.fold.back().weight != hyper.weight ||
            batch.fold.back().keep != hyper.keep) {
          batch.fold.push_back(hyper);
        }
        active.hyper = static_cast<int32_t>(batch.fold.size()) - 1;
      }
    }
    for (Batch& batch : batches_) fill_work(batch, {true, into_momentum});
    for (Batch& batch : batches_) launch_fold(batch);
  });
  bool marked = false;
  for (const Active& active : active_) {
    Slot& slot = *active.slot;
    if (folds_into_momentum(slot, into_momentum) && !slot.in_window) {
      if (PyDict_SetItem(slot.state_dict, keys().in_window, Py_True) < 0) throw_python_error();
      slot.in_window = marked = true;
    }
    THPVariable_Unpack(slot.param.object).unsafeGetTensorImpl()->mutable_grad().reset();
  }
  if (marked) snapshot_.record(groups, state);
  return "";
}

void StepPlan::leave_window(PyObject* groups, PyObject* state) {
  bool changed = false;
  for (Slot& slot : slots_) {
    if (slot.sum.object == nullptr && !slot.in_window) continue;
    changed = true;
    if (slot.sum.object != nullptr) {
      spare_sums_[static_cast<size_t>(&slot - slots_.data())] = THPVariable_Unpack(slot.sum.object);
      slot.sum.object = nullptr;  // its geometry stays, for the next window
      if (PyDict_DelItem(slot.state_dict, keys().grad_sum) < 0) throw_python_error();
    }
    if (slot.in_window) {
      slot.in_window = false;
      if (PyDict_DelItem(slot.state_dict, keys().in_window) < 0) throw_python_error();
    }
    if (PyDict_GET_SIZE(slot.state_dict) == 0) {
      if (PyObject_DelItem(state, slot.param.object) < 0) throw_python_error();
      slot.state_dict = nullptr;
    }
  }
  if (changed) snapshot_.record(groups, state);
}

}  // namespace braze
