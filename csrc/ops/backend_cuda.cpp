#include "backend_cuda.h"

#include "launch.h"
#include "optimizer_cuda.h"

namespace braze {

bool CudaBackend::is_capturing(int device) const { return cuda_is_capturing(device); }

std::unique_ptr<DeviceStep> CudaBackend::make_step(int device, const std::string& owner) const {
  return make_cuda_step(device, owner);
}

const Launches& CudaBackend::launches() const {
  static const Launches column{Launches::on_cuda()};
  return column;
}

PyObject* make_backend_module(PyModuleDef& definition, DeviceBackend& backend) {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* capsule = PyCapsule_New(&backend, DeviceBackend::kCapsuleName, nullptr);
  if (capsule == nullptr || PyModule_AddObject(module, "backend", capsule) < 0) {
    Py_XDECREF(capsule);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}

}  // namespace braze
