#include "backend_cuda.h"

#include <c10/cuda/CUDACachingAllocator.h>

#include "launch.h"
#include "optimizer_cuda.h"

namespace braze {

// Not c10::GetAllocator's, which torch.cuda.memory.change_current_allocator leaves as it was.
c10::Allocator* CudaBackend::allocator() const { return c10::cuda::CUDACachingAllocator::get(); }

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
