// StepPlan, part 5: the state that a step needs and does not find.
#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DefaultDtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include "step_plan_active.h"

namespace braze {
namespace {

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
        const at::Tensor count = counts_on_device(slot)
                                     ? at::zeros({}, param.options().dtype(c10::kFloat))
                                     : at::zeros({}, step_dtype);
        missing.push_back({&active, keys().step, count});
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
  for (const Batch& batch : batches_) {
    TORCH_CHECK(batch.begin == batch.end || batch.place.backend == nullptr ||
                    !batch.place.backend->is_capturing(batch.place.index),
                owner_,
                ": the state of a parameter does not exist yet, and a CUDA graph that makes it ",
                "would reset it at every replay; run one step on a side stream before the capture ",
                "(warm-up)");
  }
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
    created_.emplace_back(&slot, entry.key);
  }
  for (Missing& entry : missing) {
    Slot& slot = *entry.active->slot;
    adopt_states(slot);
    entry.active->linear = entry.active->linear && slot.linear;
  }
  if (allocated) check_overlap();  // so that a gradient in this memory is refused from now on
  snapshot_.record(groups, state);
}

void StepPlan::undo_state(PyObject* state) {
  if (created_.empty()) return;
  for (const auto& [slot, key] : created_) {
    if (batches_[static_cast<size_t>(slot->batch)].launched || slot->state_dict == nullptr)
      continue;
    if (PyDict_DelItem(slot->state_dict, key) < 0) PyErr_Clear();
    if (PyDict_GET_SIZE(slot->state_dict) != 0) continue;
    slot->state_dict = nullptr;
    if (PyObject_DelItem(state, slot->param.object) < 0) PyErr_Clear();
  }
  drop();
}

}  // namespace braze
