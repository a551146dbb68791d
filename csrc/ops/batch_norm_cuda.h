// The CUDA side of batch normalisation.
#pragma once
#include "batch_norm_device.h"

namespace braze {

const BatchNormDevice& cuda_batch_norm();

}  // namespace braze
