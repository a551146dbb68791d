// Clipping of gradients by themselves, any number of them in one pass or two.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace braze {

// The 2-norm of all gradients together, in the dtype and on the device that torch gives it; with
// max_norm >= 0 they are scaled to have that norm at most. Nothing, and nothing has changed, where
// torch's own code must do it: gradients that are sparse, subclasses, of other dtypes or that share
// memory; or with `refuse`, where the norm is not finite.
std::optional<at::Tensor> clip_to_norm(const std::vector<at::Tensor>& gradients, double max_norm,
                                       bool refuse);

// Each element becomes limit or -limit if its magnitude is larger. False where torch's own code
// must do it.
bool clip_to_value(const std::vector<at::Tensor>& gradients, double limit);

}  // namespace braze
