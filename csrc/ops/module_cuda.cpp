// The Python module braze._cuda: nothing but the backend, for braze._C.register_backend.
#include <Python.h>

#include "optimizer_cuda.h"

namespace braze {
namespace {

class CudaBackend final : public DeviceBackend {
 public:
  const char* name() const override { return "cuda"; }
  int device_of(const at::Tensor& tensor) const override {
    return tensor.is_cuda() ? tensor.get_device() : -1;
  }
  bool holds_scalar(const at::Tensor& tensor, bool) const override { return tensor.is_cuda(); }
  bool is_capturing(int device) const override { return cuda_is_capturing(device); }
  std::unique_ptr<DeviceStep> make_step(int device, const std::string& owner) const override {
    return make_cuda_step(device, owner);
  }
};

}  // namespace
}  // namespace braze

PyMODINIT_FUNC PyInit__cuda() {
  static braze::CudaBackend backend;
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_cuda",
                                   "braze's CUDA kernels",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* capsule = PyCapsule_New(static_cast<braze::DeviceBackend*>(&backend),
                                    braze::DeviceBackend::kCapsuleName, nullptr);
  if (capsule == nullptr || PyModule_AddObject(module, "backend", capsule) < 0) {
    Py_XDECREF(capsule);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
