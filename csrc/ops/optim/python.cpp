#include "python.h"

#include <c10/util/Exception.h>

namespace braze {
namespace {

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

}  // namespace

PyObject* dict_get(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw_python_error();
  return value;
}

PyObject* intern(const char* name) {
  PyObject* key = PyUnicode_InternFromString(name);
  if (key == nullptr) throw_python_error();
  return key;
}

const Keys& keys() {
  static const Keys* interned = new Keys{.params = intern("params"),
                                         .param_names = intern("param_names"),
                                         .differentiable = intern("differentiable"),
                                         .capturable = intern("capturable"),
                                         .fused = intern("fused"),
                                         .step = intern("step"),
                                         .grad_sum = intern("grad_sum"),
                                         .in_window = intern("in_window"),
                                         .ema = intern("ema")};
  return *interned;
}

void Objects::clear() {
  std::vector<PyObject*> objects;
  objects.swap(objects_);
  for (PyObject* object : objects) Py_DECREF(object);
}

Objects objects_of(PyObject* groups, PyObject* state) {
  Objects objects;
  walk(groups, state, [&](PyObject* object) {
    objects.add(object);
    return true;
  });
  return objects;
}

bool same_objects(const Objects& objects, PyObject* groups, PyObject* state) {
  auto expected = objects.begin();
  const auto last = objects.end();
  const bool same = walk(
      groups, state, [&](PyObject* object) { return expected != last && *expected++ == object; });
  return same && expected == last;
}

}  // namespace braze
