// The CUDA side of dropout.
#pragma once
#include "dropout_device.h"

namespace braze {

const DropoutDevice& cuda_dropout();

}  // namespace braze
