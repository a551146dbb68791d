#include "states.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DefaultDtype.h>
#include <torch/csrc/utils/object_ptr.h>

#include "../new_like.h"
#include "../tensor_work.h"

namespace braze {
namespace {

struct Missing {
  Active* active;
  PyObject* key;
  at::Tensor tensor;
};

// What sums up is fp32, or fp64 for fp64 parameters.
at::Tensor empty_wide(const at::Tensor& param) {
  const c10::ScalarType real =
      real_dtype(param.scalar_type()) == DType::f64 ? c10::kDouble : c10::kFloat;
  const c10::ScalarType dtype = param.is_complex() ? c10::toComplexType(real) : real;
  return new_lasting(param, dtype);
}

at::Tensor new_count(const Parameters& parameters, const Slot& slot) {
  if (parameters.counts_on_device(slot)) {
    return at::zeros({}, slot.param.tensor->options().dtype(c10::kFloat));
  }
  const bool wide = c10::get_default_dtype_as_scalartype() == c10::ScalarType::Double;
  return at::zeros({}, wide ? c10::ScalarType::Double : c10::ScalarType::Float);
}

PyObject* state_dict_of(Slot& slot, PyObject* state) {
  if (slot.state_dict == nullptr) {
    THPObjectPtr inner(PyDict_New());
    if (inner.get() == nullptr || PyObject_SetItem(state, slot.object, inner.get()) < 0) {
      throw_python_error();
    }
    slot.state_dict = inner.get();
  }
  return slot.state_dict;
}

}  // namespace

bool sums_in_state(const Parameters& parameters, const Slot& slot, const Destination& destination) {
  const c10::ScalarType dtype = slot.state[0].tensor ? slot.state[0].dtype : slot.param.dtype;
  const DType real = *real_dtype(dtype);
  return destination.into_state && parameters.rule.sum_in_state != nullptr &&
         (parameters.options(slot).states & 1) != 0 && !slot.has_sum() &&
         (real == DType::f32 || real == DType::f64);
}

bool States::create(Parameters& parameters, PyObject* state, std::vector<Active>& active,
                    const Destination& destination, const std::function<void()>& refuse) {
  const RuleInfo& rule = parameters.rule;
  std::vector<Missing> missing;
  bool allocated = false;
  const at::NoGradGuard no_grad;
  for (Active& a : active) {
    Slot& slot = *a.slot;
    const at::Tensor& param = *slot.param.tensor;
    const auto add = [&](PyObject* key, at::Tensor tensor) {
      missing.push_back({&a, key, std::move(tensor)});
      allocated = true;
    };
    const bool in_state = destination.fold && sums_in_state(parameters, slot, destination);
    if (!rule.first_overwrites || !destination.fold || in_state) {
      if (rule.counts_steps && slot.step.tensor == nullptr) {
        add(keys().step, new_count(parameters, slot));
      }
      const uint32_t states = parameters.options(slot).states;
      for (size_t k = 0; k < rule.state_keys.size(); ++k) {
        if (slot.state[k].tensor != nullptr || !(states >> k & 1)) continue;
        // Zeros, because a device may find out that it must not overwrite them in this step.
        add(rule.state_keys[k], new_lasting(param, param.scalar_type()).zero_());
        a.first = a.first || rule.first_overwrites;
      }
    }
    if (destination.averages && slot.average.tensor == nullptr) {
      add(keys().ema, empty_wide(param));
      a.first_average = true;
    }
    if (destination.fold && !in_state && !slot.has_sum()) {
      at::Tensor sum = std::move(spare_sums_[parameters.index_of(slot)]);
      if (sum.defined()) {
        missing.push_back({&a, keys().grad_sum, std::move(sum)});
      } else {
        add(keys().grad_sum, empty_wide(param));
      }
      a.first = true;
    }
  }
  if (missing.empty()) return false;
  refuse();
  for (Missing& entry : missing) {
    Slot& slot = *entry.active->slot;
    PyObject* inner = state_dict_of(slot, state);
    THPObjectPtr object(to_python(entry.tensor));
    if (object.get() == nullptr || PyDict_SetItem(inner, entry.key, object.get()) < 0) {
      throw_python_error();
    }
    created_.emplace_back(&slot, entry.key);
  }
  for (Missing& entry : missing) {
    Slot& slot = *entry.active->slot;
    parameters.read_states(slot);
    entry.active->linear = entry.active->linear && slot.linear;
  }
  parameters.accept(state);
  return allocated;
}

bool States::undo(PyObject* state, const std::function<bool(int32_t)>& in_use) {
  const bool any = !created_.empty();
  for (const auto& [slot, key] : created_) {
    if (in_use(slot->device) || slot->state_dict == nullptr) continue;
    if (PyDict_DelItem(slot->state_dict, key) < 0) PyErr_Clear();
    if (PyDict_GET_SIZE(slot->state_dict) != 0) continue;
    slot->state_dict = nullptr;
    if (PyObject_DelItem(state, slot->object) < 0) PyErr_Clear();
  }
  created_.clear();
  return any;
}

void States::enter_window(Parameters& parameters, PyObject* state,
                          const std::vector<Slot*>& slots) const {
  for (Slot* slot : slots) {
    if (PyDict_SetItem(slot->state_dict, keys().in_window, Py_True) < 0) throw_python_error();
    slot->in_window = true;
  }
  if (!slots.empty()) parameters.accept(state);
}

void States::leave_window(Parameters& parameters, PyObject* state) {
  bool any = false;
  for (Slot& slot : parameters.slots) {
    if (!slot.has_sum() && !slot.in_window) continue;
    any = true;
    if (slot.has_sum()) {
      spare_sums_[parameters.index_of(slot)] = *slot.sum.tensor;
      slot.sum.tensor = nullptr;  // its dimensions stay, for the next window
      if (PyDict_DelItem(slot.state_dict, keys().grad_sum) < 0) throw_python_error();
    }
    if (slot.in_window) {
      slot.in_window = false;
      if (PyDict_DelItem(slot.state_dict, keys().in_window) < 0) throw_python_error();
    }
    if (PyDict_GET_SIZE(slot.state_dict) == 0) {
      if (PyObject_DelItem(state, slot.object) < 0) throw_python_error();
      slot.state_dict = nullptr;
    }
  }
  if (any) parameters.accept(state);
}

void States::reset(size_t slots) {
  spare_sums_.clear();
  spare_sums_.resize(slots);
}

}  // namespace braze
