// Stands in for torch's header of this name in the emulated extension.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "fake_device.h"

namespace at::detail {

inline TensorBase empty_cuda(IntArrayRef size, ScalarType dtype, std::optional<Device> device,
                             std::optional<MemoryFormat>) {
  return at::empty(size,
                   at::device(fake_device::installed() ? *device : Device(kCPU)).dtype(dtype));
}

}  // namespace at::detail
