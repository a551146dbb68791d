// Dropout on a device other than the CPU.
#pragma once
#include <ATen/core/Generator.h>

#include <optional>

#include "../plan/dropout.h"

namespace braze {

class DropoutDevice {
 public:
  virtual ~DropoutDevice() = default;
  // One draw from the generator, or from the device's default one.
  virtual RandomState draw(int device, const std::optional<at::Generator>& generator) const = 0;
  // One launch on the device's current stream. Raises if it cannot be launched.
  virtual void run(int device, const DropoutArgs& args) const = 0;
};

}  // namespace braze
