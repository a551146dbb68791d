// StepPlan, part 2: one call, from gradients to kernels. Everything that can fail comes before the
// first write.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "step_plan_active.h"

namespace braze {
namespace {

// A step shorter than this keeps the GIL: letting go costs more than it gives to other threads.
constexpr int64_t kReleaseGilCost = 1 << 18;

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

const at::Tensor* tensor_of(const SeenTensor& entry) {
  return entry.object == nullptr ? nullptr : &THPVariable_Unpack(entry.object);
}

Operand operand_of(const SeenTensor& entry) {
  if (entry.object == nullptr) return {};
  return {const_cast<void*>(entry.data), nullptr, *real_dtype(entry.dtype)};
}

// Accumulators are fp32, or fp64 for fp64 parameters.
c10::ScalarType sum_dtype(const at::Tensor& param) {
  const bool wide = real_dtype(param.scalar_type()) == DType::f64;
  if (param.is_complex()) {
    return wide ? c10::ScalarType::ComplexDouble : c10::ScalarType::ComplexFloat;
  }
  return wide ? c10::ScalarType::Double : c10::ScalarType::Float;
}

}  // namespace

bool StepPlan::folds_into_momentum(const Slot& slot, bool into_momentum) const {
  const c10::ScalarType dtype = slot.state[0].object ? slot.state[0].dtype : slot.param.dtype;
  const DType real = *real_dtype(dtype);
  return into_momentum && options_[static_cast<size_t>(slot.group)].momentum != 0 &&
         slot.sum.object == nullptr && (real == DType::f32 || real == DType::f64);
}

// For a gradient that differs from its parameter in more than strides. Empty if the kernels can use
// it.
std::string StepPlan::admit_unusual(Active& active, const at::Tensor& param,
                                    const at::Tensor& grad) {
  const Slot& slot = *active.slot;
  if (grad.layout() != c10::kStrided) return "sparse";
  if (grad.key_set().has(c10::DispatchKey::Python)) return "subclass";
  TORCH_CHECK_VALUE(grad.is_cpu(), owner_, ": the gradient of ", name_of(slot),
                    " must be on the parameter's device cpu, got ", grad.device());
  TORCH_CHECK_VALUE(grad.sizes() == param.sizes(), owner_, ": the gradient of ", name_of(slot),
                    " must have the parameter's shape ", param.sizes(), ", got ", grad.sizes());
  TORCH_CHECK_TYPE(real_dtype(grad.scalar_type()) && grad.is_complex() == param.is_complex(),
                   owner_, ": the gradient of ", name_of(slot), " has dtype ", grad.scalar_type(),
                   ", which cannot go with a parameter of dtype ", param.scalar_type());
  if (!is_plain_cpu(grad)) {
    held_.push_back(grad.resolve_conj().resolve_neg());
    active.grad = &held_.back();
    if (!is_plain_cpu(*active.grad)) return "subclass";
  }
  active.linear = same_order(param, *active.grad);
  return "";
}

std::string StepPlan::collect(bool include_window) {
  active_.clear();
  held_.clear();
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
    if (gathered.finding == Finding::unusual) {
      const at::Tensor& param = THPVariable_Unpack(slot.param.object);
      if (std::string reason = admit_unusual(active, param, *gathered.grad); !reason.empty()) {
        return reason;
      }
    }
    active.linear = active.linear && slot.linear;
    if (slot.numel == 0) continue;
    TORCH_CHECK_VALUE(slot.param.data != nullptr && active.grad->const_data_ptr() != nullptr,
                      owner_, ": the memory of ", name_of(slot),
                      " or of its gradient has been freed");
    refuse_overlapping_gradient(slot, *active.grad);
  }
  return "";
}

// Allocates all that is missing, then enters it into Python's state: an allocation that fails
// changes nothing.
void StepPlan::create_state(PyObject* groups, PyObject* state, bool fold, bool into_momentum) {
  struct Missing {
    Active* active;
    PyObject* key;
    at::Tensor tensor;
  };
  std::vector<Missing> missing;
  bool allocated = false;
  const at::NoGradGuard no_grad;
  const bool wide = c10::get_default_dtype_as_scalartype() == c10::ScalarType::Double;
  const c10::ScalarType step_dtype = wide ? c10::ScalarType::Double : c10::ScalarType::Float;
  for (Active& active : active_) {
    Slot& slot = *active.slot;
    const at::Tensor& param = THPVariable_Unpack(slot.param.object);
    const bool to_momentum = fold && folds_into_momentum(slot, into_momentum);
    if (algorithm_ == Algorithm::adam) {
      if (slot.step.object == nullptr) {
        missing.push_back({&active, keys().step, at::zeros({}, step_dtype)});
        allocated = true;
      }
      const int states = num_states(options_[static_cast<size_t>(slot.group)]);
      for (int k = 0; k < states; ++k) {
        if (slot.state[k].object == nullptr) {
          missing.push_back({&active, state_key(k), at::zeros_like(param)});
          allocated = true;
        }
      }
    } else if ((!fold || to_momentum) && slot.state[0].object == nullptr &&
               options_[static_cast<size_t>(slot.group)].momentum != 0) {
      missing.push_back({&active, state_key(0), at::empty_like(param)});
      allocated = true;
      active.first = true;
    }
    if (fold && !to_momentum && slot.sum.object == nullptr) {
      at::Tensor sum = std::move(spare_sums_[static_cast<size_t>(&slot - slots_.data())]);
      if (!sum.defined()) {
        allocated = true;
        sum = at::empty_like(param, param.options().dtype(sum_dtype(param)).requires_grad(false));
      }
      missing.push_back({&active, keys().grad_sum, std::move(sum)});
      active.first = true;
    }
  }
  if (missing.empty()) return;
  for (Missing& entry : missing) {
    Slot& slot = *entry.active->slot;
    if (slot.state_dict == nullptr) {
      const PyRef inner(PyDict_New());
      if (inner.get() == nullptr || PyObject_SetItem(state, slot.param.object, inner.get()) < 0) {
        throw_python_error();
      }
      slot.state_dict = inner.get();
    }
    const PyRef object(THPVariable_Wrap(entry.tensor));
    if (object.get() == nullptr || PyDict_SetItem(slot.state_dict, entry.key, object.get()) < 0) {
      throw_python_error();
    }
  }
  for (Missing& entry : missing) {
    Slot& slot = *entry.active->slot;
    adopt_states(slot);
    entry.active->linear = entry.active->linear && slot.linear;
  }
  if (allocated) check_overlap();  // so that a gradient in this memory is refused from now on
  snapshot_.record(groups, state);
}

void StepPlan::fill_work(const Destination& destination) {
  bool all_linear = true;
  work_key_scratch_.assign({rebuilds_, destination.fold, destination.into_momentum});
  for (const Active& active : active_) {
    const GroupOptions& o = options_[static_cast<size_t>(active.slot->group)];
    all_linear = all_linear && active.linear;
    work_key_scratch_.push_back((active.slot - slots_.data()) * 64 + active.linear * 32 +
                                (active.grad != nullptr) * 16 +
                                (active.slot->sum.object != nullptr) * 8 + num_states(o));
  }
  if (all_linear && work_key_scratch_ == work_key_) {
    for (size_t i = 0; i < active_.size(); ++i) {
      work_[i].hyper = active_[i].hyper;
      work_[i].first = active_[i].first;
      if (active_[i].grad != nullptr) work_[i].grad = linear_operand(*active_[i].grad);
    }
    return;
  }
  layouts_.clear();
  work_.resize(active_.size());
  for (size_t i = 0; i < active_.size(); ++i) fill(work_[i], active_[i], destination);
  chunks_.build(work_);
  work_key_.swap(work_key_scratch_);
}

void StepPlan::fill(TensorWork& work, const Active& active, const Destination& destination) {
  const Slot& slot = *active.slot;
  const SeenTensor* entries[kMaxStates] = {};
  const SeenTensor* sum = nullptr;
  if (destination.fold) {
    entries[0] = folds_into_momentum(slot, destination.into_momentum) ? &slot.state[0] : &slot.sum;
  } else {
    const int used = num_states(options_[static_cast<size_t>(slot.group)]);
    for (int k = 0; k < used; ++k) entries[k] = &slot.state[k];
    sum = &slot.sum;
  }
  work.hyper = active.hyper;
  work.first = active.first;
  work.is_double = slot.real == DType::f64;
  work.linear = active.linear;
  if (work.linear) {
    work.numel = slot.numel;
    work.param = {const_cast<void*>(slot.param.data), nullptr, slot.real};
    work.grad = active.grad == nullptr ? Operand{} : linear_operand(*active.grad);
    work.sum = sum == nullptr ? Operand{} : operand_of(*sum);
    for (int k = 0; k < kMaxStates; ++k) {
      work.state[k] = entries[k] == nullptr ? Operand{} : operand_of(*entries[k]);
    }
    return;
  }
  const at::Tensor* states[kMaxStates] = {};
  for (int k = 0; k < kMaxStates; ++k) {
    states[k] = entries[k] == nullptr ? nullptr : tensor_of(*entries[k]);
  }
  lay_out(work,
          {{&THPVariable_Unpack(slot.param.object), &work.param},
           {active.grad, &work.grad},
           {sum == nullptr ? nullptr : tensor_of(*sum), &work.sum},
           {states[0], &work.state[0]},
           {states[1], &work.state[1]},
           {states[2], &work.state[2]}},
          layouts_);
}

template <class Launch>
void StepPlan::launch(Launch run) {
  const int threads = at::get_num_threads();
  if (chunks_.cost < kReleaseGilCost) {
    run(threads);
    return;
  }
  for (const Active& active : active_) {
    if (active.grad != nullptr) held_.push_back(*active.grad);
  }
  const GilReleased released;
  run(threads);
}

std::string StepPlan::step(PyObject* groups, PyObject* state, StepScalars scalars) {
  Guard guard(*this);
  refresh(groups, state);
  const bool window = scalars.window_weight >= 0;
  if (std::string reason = collect(window); !reason.empty()) return reason;
  const bool present = std::any_of(active_.begin(), active_.end(),
                                   [](const Active& active) { return active.grad != nullptr; });
  if (active_.empty() || (scalars.need_gradient && !present)) return "none";
  if (window && scalars.mean) {
    scalars.divisor = scalars.window_weight + (present ? 1 : 0);
    TORCH_CHECK_VALUE(scalars.divisor != 0, owner_,
                      ": the weights of the accumulated gradients sum to 0");
  }
  create_state(groups, state, false, false);
  adam_.clear();
  sgd_.clear();
  for (Active& active : active_) {
    if (algorithm_ == Algorithm::adam) {
      active.step = read_step(active.slot->step) + 1;
      active.hyper = adam_hyper(active, scalars);
    } else {
      active.hyper = sgd_hyper(active, scalars);
    }
  }
  fill_work({});
  launch([&](int threads) {
    if (algorithm_ == Algorithm::adam) {
      cpu::adam_step(work_, chunks_, adam_, threads);
    } else {
      cpu::sgd_step(work_, chunks_, sgd_, threads);
    }
  });
  for (const Active& active : active_) {
    if (algorithm_ == Algorithm::adam) write_step(active.slot->step, active.step);
    THPVariable_Unpack(active.slot->param.object).unsafeGetTensorImpl()->bump_version();
  }
  if (window) leave_window(groups, state);
  return "";
}

std::string StepPlan::fold(PyObject* groups, PyObject* state, double weight, bool into_momentum) {
  Guard guard(*this);
  refresh(groups, state);
  if (std::string reason = collect(false); !reason.empty()) return reason;
  if (active_.empty()) return "none";
  create_state(groups, state, true, into_momentum);
  fold_.clear();
  for (Active& active : active_) {
    const GroupOptions& o = options_[static_cast<size_t>(active.slot->group)];
    const bool to_momentum = folds_into_momentum(*active.slot, into_momentum);
    // A buffer carries the sign of the update direction; an accumulator carries the gradient
    // itself.
    const double signed_weight = to_momentum && o.maximize ? -weight : weight;
    const double keep = to_momentum && !active.slot->in_window ? o.momentum : 1;
    const cpu::FoldHyper hyper{signed_weight, keep};
    if (fold_.empty() || fold_.back().weight != hyper.weight || fold_.back().keep != hyper.keep) {
      fold_.push_back(hyper);
    }
    active.hyper = static_cast<int32_t>(fold_.size()) - 1;
  }
  fill_work({true, into_momentum});
  launch([&](int threads) { cpu::fold_gradients(work_, chunks_, fold_, threads); });
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
