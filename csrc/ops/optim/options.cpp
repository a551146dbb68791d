#include "options.h"

#include <torch/csrc/utils/object_ptr.h>

#include <cstring>
#include <limits>
#include <string>

#include "../device_backend.h"

namespace braze {
namespace {

// One read of one group.
class Parser {
 public:
  Parser(PyObject* group, size_t index) : group_(group), index_(index) {}

  void read(GroupOptions& options, const RuleInfo& rule) {
    options.on_device = flag(keys().capturable) || flag(keys().fused);
    options.differentiable = flag(keys().differentiable);
    size_t tensors = 0;
    for (size_t f = 0; f < rule.fields.size(); ++f) {
      const Field& field = rule.fields[f];
      PyObject* key = rule.field_keys[f];
      char* to = options.values + field.offset;
      if (field.kind == Field::flag) {
        const bool value = flag(key);
        memcpy(to, &value, sizeof(value));
        continue;
      }
      const at::Tensor** tensor = nullptr;
      if (field.may_be_on_device()) tensor = &options.tensors[tensors++];
      const double value = field.kind == Field::sign
                               ? (flag(key) ? -1.0 : 1.0)
                               : number(field, key, tensor, options.on_device);
      memcpy(to, &value, sizeof(value));
      options.any_tensor = options.any_tensor || (tensor != nullptr && *tensor != nullptr);
    }
    options.states = rule.states(options.values);
  }

  bool reusable = true;  // no value can change without becoming another object

 private:
  std::string describe(const char* name) const {
    return "param_groups[" + std::to_string(index_) + "]['" + name + "']";
  }

  bool flag(PyObject* key) {
    PyObject* found = dict_get(group_, key);
    if (found == nullptr) return false;
    const int truth = PyObject_IsTrue(found);
    if (truth < 0) throw_python_error();
    if (!PyBool_Check(found) && found != Py_None) reusable = false;
    return truth == 1;
  }

  double number(const Field& field, PyObject* key, const at::Tensor** tensor, bool wanted) {
    PyObject* found = dict_get(group_, key);
    if (found == nullptr && field.kind == Field::optional_number) return 0;
    if (found == nullptr) {
      PyErr_Format(PyExc_KeyError, "param_groups[%zu] has no '%U'", index_, key);
      throw_python_error();
    }
    if (field.kind != Field::first_of_pair && field.kind != Field::second_of_pair) {
      return to_double(found, field.name, tensor, wanted);
    }
    TORCH_CHECK_TYPE((PyTuple_Check(found) || PyList_Check(found)) && PySequence_Size(found) == 2,
                     describe(field.name), " must be a pair of numbers");
    if (!PyTuple_CheckExact(found)) reusable = false;
    THPObjectPtr item(PySequence_GetItem(found, field.kind == Field::second_of_pair));
    return to_double(item.get(), field.name, tensor, wanted);
  }

  // From a Python number or a one-element tensor; a tensor's value may change without its identity.
  // NaN, and the tensor in `tensor`, for one that a kernel is to read.
  double to_double(PyObject* value, const char* name, const at::Tensor** tensor, bool wanted) {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    if (const at::Tensor* scalar = tensor_in(value)) {
      TORCH_CHECK_VALUE(scalar->numel() == 1, describe(name),
                        " must be a number or a tensor of one element, got a tensor of shape ",
                        scalar->sizes());
      reusable = false;
      if (tensor != nullptr && is_device_scalar(*scalar, wanted)) {
        *tensor = scalar;
        return std::numeric_limits<double>::quiet_NaN();
      }
      return scalar->item().toDouble();
    }
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      TORCH_CHECK_TYPE(false, describe(name), " must be a number, got ", Py_TYPE(value)->tp_name);
    }
    if (!PyLong_CheckExact(value)) reusable = false;
    return number;
  }

  PyObject* group_;
  size_t index_;
};

}  // namespace

void GroupReader::read(PyObject* group, size_t index, const RuleInfo& rule) {
  PyObject *key, *value;
  if (reusable_) {
    auto expected = seen_.begin();
    bool same = true;
    for (Py_ssize_t at = 0; same && PyDict_Next(group, &at, &key, &value);) {
      same = seen_.end() - expected >= 2 && *expected++ == key && *expected++ == value;
    }
    if (same && expected == seen_.end()) return;
  }
  seen_.clear();
  reusable_ = false;
  GroupOptions options;
  Parser parser(group, index);
  parser.read(options, rule);
  options_ = options;
  for (Py_ssize_t at = 0; PyDict_Next(group, &at, &key, &value);) {
    seen_.add(key);
    seen_.add(value);
  }
  reusable_ = parser.reusable;
}

GroupOptions with_values(const GroupOptions& options, const RuleInfo& rule) {
  GroupOptions result = options;
  size_t tensors = 0;
  for (const Field& field : rule.fields) {
    if (!field.may_be_on_device()) continue;
    const at::Tensor* tensor = options.tensors[tensors++];
    if (tensor == nullptr) continue;
    const double value = tensor->item().toDouble();
    memcpy(result.values + field.offset, &value, sizeof(value));
  }
  return result;
}

}  // namespace braze
