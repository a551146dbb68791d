#include "python_state.h"

#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>

#include "device_backend.h"

namespace braze {
namespace {

PyObject* intern(const char* name) {
  PyObject* key = PyUnicode_InternFromString(name);
  if (key == nullptr) throw_python_error();
  return key;
}

// Calls visit(object) for every object in a fixed order, until it returns false.
template <class Visit>
bool walk(PyObject* groups, PyObject* state, Visit visit) {
  TORCH_CHECK_TYPE(PyList_Check(groups), "param_groups must be a list, got ",
                   Py_TYPE(groups)->tp_name);
  TORCH_CHECK_TYPE(PyDict_Check(state), "state must be a dict, got ", Py_TYPE(state)->tp_name);
  const Py_ssize_t num_groups = PyList_GET_SIZE(groups);
  for (Py_ssize_t g = 0; g < num_groups; ++g) {
    PyObject* group = PyList_GET_ITEM(groups, g);
    TORCH_CHECK_TYPE(PyDict_Check(group), "param_groups[", g, "] must be a dict, got ",
                     Py_TYPE(group)->tp_name);
    PyObject* params = dict_get(group, keys().params);
    TORCH_CHECK_TYPE(params != nullptr && PyList_Check(params), "param_groups[", g,
                     "]['params'] must be a list of parameters");
    if (!visit(group) || !visit(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      if (!visit(PyList_GET_ITEM(params, i))) return false;
    }
  }
  if (!visit(state)) return false;
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
    if (!visit(key) || !visit(value)) return false;
    if (!PyDict_Check(value)) continue;
    PyObject *name, *entry;
    for (Py_ssize_t inner = 0; PyDict_Next(value, &inner, &name, &entry);) {
      if (!visit(name) || !visit(entry)) return false;
    }
  }
  return true;
}

std::string describe(size_t group, const char* name) {
  return "param_groups[" + std::to_string(group) + "]['" + name + "']";
}

// A number from a Python number or a one-element tensor; a tensor's value may change without its
// identity. NaN, and the tensor in `device`, for one that a kernel is to read.
double to_double(PyObject* value, size_t group, const char* name, bool& reusable,
                 PyObject** device = nullptr, bool wanted = false) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    TORCH_CHECK_VALUE(tensor.numel() == 1, describe(group, name),
                      " must be a number or a tensor of one element, got a tensor of shape ",
                      tensor.sizes());
    reusable = false;
    if (device != nullptr && is_device_scalar(tensor, wanted)) {
      *device = value;
      return std::numeric_limits<double>::quiet_NaN();
    }
    return tensor.item().toDouble();
  }
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    TORCH_CHECK_TYPE(false, describe(group, name), " must be a number, got ",
                     Py_TYPE(value)->tp_name);
  }
  if (!PyLong_CheckExact(value)) reusable = false;
  return number;
}

}  // namespace

void throw_python_error() { throw python_error(); }

PyObject* dict_get(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw_python_error();
  return value;
}

const Keys& keys() {
  static const Keys* interned =
      new Keys{intern("params"),          intern("param_names"), intern("lr"),
               intern("betas"),           intern("eps"),         intern("weight_decay"),
               intern("amsgrad"),         intern("maximize"),    intern("decoupled_weight_decay"),
               intern("differentiable"),  intern("momentum"),    intern("dampening"),
               intern("nesterov"),        intern("l1"),          intern("step"),
               intern("exp_avg"),         intern("exp_avg_sq"),  intern("max_exp_avg_sq"),
               intern("momentum_buffer"), intern("grad_sum"),    intern("in_window"),
               intern("capturable"),      intern("fused")};
  return *interned;
}

void Snapshot::record(PyObject* groups, PyObject* state) {
  std::vector<PyObject*> objects;
  objects.reserve(objects_.size());
  walk(groups, state, [&](PyObject* object) {
    objects.push_back(object);
    return true;
  });
  for (PyObject* object : objects) Py_INCREF(object);
  objects_.swap(objects);
  for (PyObject* object : objects) Py_DECREF(object);
}

bool Snapshot::matches(PyObject* groups, PyObject* state) const {
  auto expected = objects_.begin();
  const auto last = objects_.end();
  const bool same = walk(
      groups, state, [&](PyObject* object) { return expected != last && *expected++ == object; });
  return same && expected == last;
}

void Snapshot::clear() {
  std::vector<PyObject*> objects;
  objects.swap(objects_);
  for (PyObject* object : objects) Py_DECREF(object);
}

int Snapshot::traverse(visitproc visit, void* arg) const {
  for (PyObject* object : objects_) Py_VISIT(object);
  return 0;
}

const GroupOptions& GroupReader::read(PyObject* group, size_t index, Algorithm algorithm) {
  PyObject *key, *value;
  if (reusable_) {
    auto expected = seen_.begin();
    bool same = true;
    for (Py_ssize_t at = 0; same && PyDict_Next(group, &at, &key, &value);) {
      same = seen_.end() - expected >= 2 && *expected++ == key && *expected++ == value;
    }
    if (same && expected == seen_.end()) return options_;
  }
  clear();

  bool reusable = true;
  const auto require = [&](PyObject* name) {
    PyObject* found = dict_get(group, name);
    if (found == nullptr) {
      PyErr_Format(PyExc_KeyError, "param_groups[%zu] has no '%U'", index, name);
      throw_python_error();
    }
    return found;
  };
  GroupOptions o;
  const auto number = [&](PyObject* name, const char* text, PyObject** device = nullptr) {
    return to_double(require(name), index, text, reusable, device, o.on_device);
  };
  const auto flag = [&](PyObject* name) {
    PyObject* found = dict_get(group, name);
    if (found == nullptr) return false;
    const int truth = PyObject_IsTrue(found);
    if (truth < 0) throw_python_error();
    if (!PyBool_Check(found) && found != Py_None) reusable = false;
    return truth == 1;
  };

  const Keys& k = keys();
  o.on_device = flag(k.capturable) || flag(k.fused);
  o.lr = number(k.lr, "lr", &o.device.lr);
  o.weight_decay = number(k.weight_decay, "weight_decay", &o.device.weight_decay);
  o.maximize = flag(k.maximize);
  o.differentiable = flag(k.differentiable);
  if (PyObject* l1 = dict_get(group, k.l1)) o.l1 = to_double(l1, index, "l1", reusable);
  if (algorithm == Algorithm::adam) {
    PyObject* betas = require(k.betas);
    TORCH_CHECK_TYPE((PyTuple_Check(betas) || PyList_Check(betas)) && PySequence_Size(betas) == 2,
                     describe(index, "betas"), " must be a pair of numbers");
    if (!PyTuple_CheckExact(betas)) reusable = false;
    const PyRef first(PySequence_GetItem(betas, 0)), second(PySequence_GetItem(betas, 1));
    o.beta1 = to_double(first.get(), index, "betas", reusable, &o.device.beta1, o.on_device);
    o.beta2 = to_double(second.get(), index, "betas", reusable, &o.device.beta2, o.on_device);
    o.eps = number(k.eps, "eps");
    o.amsgrad = flag(k.amsgrad);
    o.decoupled_weight_decay = flag(k.decoupled_weight_decay);
  } else {
    o.momentum = number(k.momentum, "momentum", &o.device.momentum);
    o.dampening = number(k.dampening, "dampening", &o.device.dampening);
    o.nesterov = flag(k.nesterov);
  }

  options_ = o;
  for (Py_ssize_t at = 0; PyDict_Next(group, &at, &key, &value);) {
    for (PyObject* object : {key, value}) {
      Py_INCREF(object);
      seen_.push_back(object);
    }
  }
  reusable_ = reusable;
  return options_;
}

int GroupReader::traverse(visitproc visit, void* arg) const {
  for (PyObject* object : seen_) Py_VISIT(object);
  return 0;
}

void GroupReader::clear() {
  std::vector<PyObject*> objects;
  objects.swap(seen_);
  reusable_ = false;
  for (PyObject* object : objects) Py_DECREF(object);
}

}  // namespace braze
