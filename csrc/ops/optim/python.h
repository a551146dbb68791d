// Python's objects in C++: references, dict keys, and the identity of every object in an
// optimizer's param_groups and state. The GIL must be held.
#pragma once
#include <ATen/core/Tensor.h>
#include <Python.h>

#include <string>
#include <utility>
#include <vector>

namespace braze {

// Strong references, so that an address is never reused: equal addresses mean the same objects.
class Objects {
 public:
  Objects() = default;
  Objects(Objects&& other) noexcept { objects_.swap(other.objects_); }
  Objects& operator=(Objects&& other) noexcept {
    objects_.swap(other.objects_);
    return *this;
  }
  ~Objects() { clear(); }
  void add(PyObject* object) {
    Py_INCREF(object);
    objects_.push_back(object);
  }
  void clear();
  int traverse(visitproc visit, void* arg) const {
    for (PyObject* object : objects_) Py_VISIT(object);
    return 0;
  }
  bool empty() const { return objects_.empty(); }
  auto begin() const { return objects_.begin(); }
  auto end() const { return objects_.end(); }

 private:
  std::vector<PyObject*> objects_;
};

// Raises the pending Python exception as a C++ one that pybind11 hands back unchanged. This and the
// next two are in bindings.cpp: torch's Python headers take longer to compile than all of this.
[[noreturn]] void throw_python_error();
// The tensor inside a Python object, or null if that is none. It stays where it is while the object
// lives.
const at::Tensor* tensor_in(PyObject* object);
// A new reference, or null with an exception set.
PyObject* to_python(const at::Tensor& tensor);

// dict[key] or null; borrowed.
PyObject* dict_get(PyObject* dict, PyObject* key);

PyObject* intern(const char* name);

// The keys that are the same for every rule, interned.
struct Keys {
  PyObject *params, *param_names, *differentiable, *capturable, *fused;  // of a group
  PyObject *step, *grad_sum, *in_window, *ema;                           // of a parameter's state
};
const Keys& keys();

// The objects of param_groups and state in walking order.
Objects objects_of(PyObject* groups, PyObject* state);
// True if they are these still: nothing was added, removed or replaced.
bool same_objects(const Objects& objects, PyObject* groups, PyObject* state);

}  // namespace braze
