#include "backend_cuda.h"

#include "batch_norm_cuda.h"
#include "dropout_cuda.h"
#include "optimizer_cuda.h"

namespace braze {

bool CudaBackend::is_capturing(int device) const { return cuda_is_capturing(device); }

std::unique_ptr<DeviceStep> CudaBackend::make_step(int device, const std::string& owner) const {
  return make_cuda_step(device, owner);
}

const BatchNormDevice& CudaBackend::batch_norm() const { return cuda_batch_norm(*this); }

const DropoutDevice& CudaBackend::dropout() const { return cuda_dropout(); }

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
