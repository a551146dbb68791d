// Dropout on a device other than the CPU.
#pragma once
#include <ATen/core/Tensor.h>

namespace braze {

class DropoutDevice {
 public:
  virtual ~DropoutDevice() = default;
};

}  // namespace braze
