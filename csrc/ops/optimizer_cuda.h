// The CUDA side of the optimizer step.
#pragma once
#include "device_backend.h"

namespace braze {

std::unique_ptr<DeviceStep> make_cuda_step(int device, const std::string& owner);

// Whether the device's current stream is being captured into a graph.
bool cuda_is_capturing(int device);

}  // namespace braze
