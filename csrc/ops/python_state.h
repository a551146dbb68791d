// What an optimizer keeps in Python, read from C++: the identity of every object in param_groups
// and state, and the hyper-parameters of each group. The GIL must be held.
#pragma once
#include <Python.h>

#include <string>
#include <utility>
#include <vector>

namespace braze {

// An owned reference.
class PyRef {
 public:
  PyRef() = default;
  explicit PyRef(PyObject* owned) : object_(owned) {}
  PyRef(PyRef&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  PyRef& operator=(PyRef&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  PyRef(const PyRef&) = delete;
  PyRef& operator=(const PyRef&) = delete;
  ~PyRef() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_ = nullptr;
};

// Raises the pending Python exception as a C++ one that pybind11 hands back unchanged.
[[noreturn]] void throw_python_error();

// dict[key] or null; borrowed.
PyObject* dict_get(PyObject* dict, PyObject* key);

// Interned keys, made once.
struct Keys {
  PyObject *params, *param_names, *lr, *betas, *eps, *weight_decay, *amsgrad, *maximize,
      *decoupled_weight_decay, *differentiable, *momentum, *dampening, *nesterov, *l1, *step,
      *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *momentum_buffer, *grad_sum, *in_window, *capturable,
      *fused;
};
const Keys& keys();

// The objects of param_groups and state in walking order, held strongly so that an address is never
// reused: equal addresses mean that nothing was added, removed or replaced.
class Snapshot {
 public:
  ~Snapshot() { clear(); }
  Snapshot() = default;
  Snapshot(const Snapshot&) = delete;
  Snapshot& operator=(const Snapshot&) = delete;

  void record(PyObject* groups, PyObject* state);
  bool matches(PyObject* groups, PyObject* state) const;
  void clear();
  int traverse(visitproc visit, void* arg) const;
  bool empty() const { return objects_.empty(); }

 private:
  std::vector<PyObject*> objects_;
};

// Options that are tensors in device memory, which only kernels read; borrowed, null where the
// number is known.
struct DeviceOptions {
  PyObject *lr = nullptr, *weight_decay = nullptr;
  PyObject *beta1 = nullptr, *beta2 = nullptr;         // adam
  PyObject *momentum = nullptr, *dampening = nullptr;  // sgd
  bool any() const {
    return lr != nullptr || weight_decay != nullptr || beta1 != nullptr || beta2 != nullptr ||
           momentum != nullptr || dampening != nullptr;
  }
};

// Hyper-parameters of one group. SGD and Adam each read their own part.
struct GroupOptions {
  DeviceOptions device;    // what stands here is NaN below
  bool on_device = false;  // step counts belong in device memory: capturable or fused
  double lr = 0, weight_decay = 0, l1 = 0;
  bool maximize = false, differentiable = false;
  double beta1 = 0, beta2 = 0, eps = 0;
  bool amsgrad = false, decoupled_weight_decay = false;
  double momentum = 0, dampening = 0;
  bool nesterov = false;
};

enum class Algorithm { adam, sgd };

// Reads groups[index]; parsed again only if one of its values is another object than last time, or
// mutable.
class GroupReader {
 public:
  ~GroupReader() { clear(); }
  GroupReader() = default;
  GroupReader(GroupReader&& other) noexcept
      : seen_(std::move(other.seen_)), reusable_(other.reusable_), options_(other.options_) {
    other.seen_.clear();
  }
  GroupReader& operator=(GroupReader&&) = delete;

  const GroupOptions& read(PyObject* group, size_t index, Algorithm algorithm);
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  std::vector<PyObject*> seen_;  // keys and values, in dict order
  bool reusable_ = false;
  GroupOptions options_;
};

}  // namespace braze
