// What the measurements of several devices are together.
#pragma once
#include <vector>

#include "device_backend.h"

namespace braze {

// On the first one's device, not waited for; `squares` has an element for each. The gradients' norm
// is sqrt(all squares) * norm_scale / grad_scale.
Measured combined(const std::vector<Measured>& measured, double norm_scale,
                  const at::Tensor* grad_scale);

}  // namespace braze
