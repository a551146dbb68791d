// The backend of CUDA devices, without which tensors are theirs: braze._cuda's are CUDA tensors,
// the emulated device's are CPU tensors.
#pragma once
#include <Python.h>

#include "device_backend.h"

namespace braze {

class CudaBackend : public DeviceBackend {
 public:
  c10::Allocator* allocator() const override;
  bool is_capturing(int device) const override;
  std::unique_ptr<DeviceStep> make_step(int device, const std::string& owner) const override;
  const Launches& launches() const override;
};

// An extension module that offers `backend`, for braze._C.register_backend. Null: a Python error is
// set.
PyObject* make_backend_module(PyModuleDef& definition, DeviceBackend& backend);

}  // namespace braze
