#include "parameters.h"

#include <algorithm>

#include "../tensor_work.h"

namespace braze {

std::string Parameters::name_of(const Slot& slot) const {
  std::string text = "param_groups[" + std::to_string(slot.group) + "]['params'][" +
                     std::to_string(slot.index) + "]";
  PyObject* group = PyList_GetItem(groups, slot.group);
  PyObject* names = group == nullptr ? nullptr : PyDict_GetItemWithError(group, keys().param_names);
  if (names != nullptr && PyList_Check(names) && slot.index < PyList_GET_SIZE(names)) {
    const char* name = PyUnicode_AsUTF8(PyList_GET_ITEM(names, slot.index));
    if (name != nullptr) text += std::string(" ('") + name + "')";
  }
  PyErr_Clear();
  return text;
}

void Parameters::read_state(Slot& slot, SeenTensor& entry, PyObject* object, PyObject* key) {
  const at::Tensor* found = tensor_in(object);
  const char* name = PyUnicode_AsUTF8(key);
  TORCH_CHECK_TYPE(found != nullptr, owner, ": state['", name, "'] of ", name_of(slot),
                   " must be a tensor, got ", Py_TYPE(object)->tp_name);
  if (found == entry.tensor) return;
  const at::Tensor& param = *slot.param.tensor;
  const at::Tensor& tensor = *found;
  if (tensor.is_conj() || tensor.is_neg()) {
    slot.obstacle = "subclass";
    return;
  }
  const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
  if (tensor.is_sparse() && grad.defined() && grad.is_sparse()) {  // torch's own code made it
    slot.obstacle = "sparse";
    return;
  }
  const bool counts = &entry == &slot.step;  // which the CPU may keep for any device
  TORCH_CHECK_VALUE(
      is_plain(tensor) && (tensor.device() == param.device() || (counts && tensor.is_cpu())), owner,
      ": state['", name, "'] of ", name_of(slot), " must be a dense tensor on ", param.device(),
      counts && !param.is_cpu() ? " or cpu" : "", ", got ", tensor.toString(), " on ",
      tensor.device());
  const c10::ScalarType dtype = tensor.scalar_type();
  if (counts) {
    TORCH_CHECK_TYPE(tensor.numel() == 1 &&
                         (dtype == c10::ScalarType::Float || dtype == c10::ScalarType::Double),
                     owner, ": state['step'] of ", name_of(slot),
                     " must be a one-element tensor of float32 or float64, got ", dtype,
                     " of shape ", tensor.sizes());
    seen_.record(entry, tensor, nullptr);
    return;
  }
  TORCH_CHECK_VALUE(tensor.sizes() == param.sizes(), owner, ": state['", name, "'] of ",
                    name_of(slot), " must have the parameter's shape ", param.sizes(), ", got ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(real_dtype(dtype) && tensor.is_complex() == param.is_complex(), owner,
                   ": state['", name, "'] of ", name_of(slot), " has dtype ", dtype,
                   ", which cannot go with a parameter of dtype ", param.scalar_type());
  TORCH_CHECK_VALUE(tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, owner,
                    ": the memory of state['", name, "'] of ", name_of(slot), " has been freed");
  TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense() ||
                        is_non_overlapping(tensor.sizes().vec(), tensor.strides().vec()),
                    owner, ": elements of state['", name, "'] of ", name_of(slot), " (strides ",
                    tensor.strides(), ") share memory with each other; clone it");
  // Same dimensions as the parameter's: compare with those, they are in the cache.
  const bool alike = tensor.strides() == param.strides();
  seen_.record(entry, tensor, alike ? &slot.param.dims : nullptr);
  slot.linear = slot.linear && same_order(param, tensor);
}

void Parameters::read_states(Slot& slot) {
  if (slot.state_dict == nullptr) return;
  const auto read = [&](SeenTensor& entry, PyObject* key) {
    PyObject* object = dict_get(slot.state_dict, key);
    if (object != nullptr && object != Py_None) read_state(slot, entry, object, key);
  };
  for (size_t k = 0; k < rule.state_keys.size(); ++k) read(slot.state[k], rule.state_keys[k]);
  if (rule.counts_steps) read(slot.step, keys().step);
  read(slot.sum, keys().grad_sum);
  read(slot.average, keys().ema);
  slot.in_window = dict_get(slot.state_dict, keys().in_window) != nullptr;
}

void Parameters::build_slot(Slot& slot, PyObject* state) {
  slot.param.tensor = tensor_in(slot.object);
  TORCH_CHECK_TYPE(slot.param.tensor != nullptr, owner, ": ", name_of(slot),
                   " must be a tensor, got ", Py_TYPE(slot.object)->tp_name);
  const at::Tensor& param = *slot.param.tensor;
  if (param.is_meta()) {
    slot.obstacle = "meta";
  } else if (param.key_set().has(c10::DispatchKey::Python)) {
    slot.obstacle = "subclass";
  } else if (!param.is_cpu() && device_place(param).backend == nullptr) {
    slot.obstacle = param.is_cuda() ? "cuda" : "device";
  } else if (param.layout() != c10::kStrided) {
    slot.obstacle = "sparse";
  } else if (!real_dtype(param.scalar_type())) {
    slot.obstacle = "dtype";
  } else if (!is_plain(param)) {
    slot.obstacle = "subclass";
  }
  if (slot.obstacle != nullptr) return;
  slot.device = device_of(param);
  any_on_cpu = any_on_cpu || slot.device == 0;
  seen_.record(slot.param, param, nullptr);
  slot.real = *real_dtype(param.scalar_type());
  slot.numel = param.numel() * (param.is_complex() ? 2 : 1);
  slot.linear = param.is_non_overlapping_and_dense();
  TORCH_CHECK_VALUE(slot.linear || is_non_overlapping(param.sizes().vec(), param.strides().vec()),
                    owner, ": elements of ", name_of(slot), " (shape ", param.sizes(), ", strides ",
                    param.strides(), ") share memory with each other, so a step ",
                    "would update them more than once; pass a contiguous tensor, for example ",
                    "param.clone()");
  PyObject* inner = dict_get(state, slot.object);
  if (inner == nullptr) return;
  TORCH_CHECK_TYPE(PyDict_Check(inner), owner, ": state of ", name_of(slot),
                   " must be a dict, got ", Py_TYPE(inner)->tp_name);
  slot.state_dict = inner;
  read_states(slot);
}

void Parameters::build(PyObject* its_groups, PyObject* state) {
  clear();
  groups = its_groups;
  any_on_cpu = false;
  try {
    accept(state);
    const Py_ssize_t num_groups = PyList_GET_SIZE(groups);
    readers_.resize(static_cast<size_t>(num_groups));
    for (Py_ssize_t g = 0; g < num_groups; ++g) {
      PyObject* params = dict_get(PyList_GET_ITEM(groups, g), keys().params);
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
        Slot& slot = slots.emplace_back();
        slot.object = PyList_GET_ITEM(params, i);
        slot.group = static_cast<int32_t>(g);
        slot.index = static_cast<int32_t>(i);
        build_slot(slot, state);
      }
    }
  } catch (...) {
    clear();
    throw;
  }
}

void Parameters::read_options() {
  for (size_t g = 0; g < readers_.size(); ++g) {
    readers_[g].read(PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(g)), g, rule);
  }
}

bool Parameters::needs_build() const {
  return objects_.empty() || std::any_of(slots.begin(), slots.end(),
                                         [](const Slot& slot) { return slot.obstacle != nullptr; });
}

void Parameters::clear() {
  slots.clear();
  seen_.clear();
  readers_.clear();
  objects_.clear();
}

int Parameters::traverse(visitproc visit, void* arg) const {
  if (const int result = objects_.traverse(visit, arg)) return result;
  for (const GroupReader& reader : readers_) {
    if (const int result = reader.traverse(visit, arg)) return result;
  }
  return 0;
}

int32_t Parameters::device_of(const at::Tensor& param) {
  const DevicePlace place = device_place(param);
  for (size_t i = 0; i < devices.size(); ++i) {
    if (devices[i].backend == place.backend && devices[i].index == place.index) {
      return static_cast<int32_t>(i);
    }
  }
  devices.push_back(place);
  return static_cast<int32_t>(devices.size()) - 1;
}

bool Parameters::counts_on_device(const Slot& slot) const {
  const DevicePlace& place = devices[static_cast<size_t>(slot.device)];
  if (place.backend == nullptr || !rule.counts_steps) return false;
  const bool wanted = options(slot).on_device || device_counts;
  if (slot.step.tensor == nullptr) return wanted;
  return place.backend->holds_scalar(*slot.step.tensor, wanted);
}

}  // namespace braze
