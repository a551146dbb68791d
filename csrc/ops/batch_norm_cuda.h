// The CUDA side of batch normalisation.
#pragma once
#include "batch_norm_device.h"
#include "device_backend.h"

namespace braze {

// The backend says which device a tensor is on.
const BatchNormDevice& cuda_batch_norm(const DeviceBackend& backend);

}  // namespace braze
