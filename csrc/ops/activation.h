// Activations by name, and as torch computes them.
#pragma once
#include <ATen/core/Tensor.h>

#include <string_view>

#include "../math/activation.h"

namespace braze {

// Raises ValueError for any other name.
Activation activation_named(std::string_view name);

inline const char* name_of(Activation activation) {
  return kActivationNames[static_cast<size_t>(activation)];
}

at::Tensor activate_by_torch(const at::Tensor& z, Activation activation, double parameter);

// dy activation'(z), as a function of both that torch differentiates.
at::Tensor gradient_by_torch(const at::Tensor& dy, const at::Tensor& z, Activation activation,
                             double parameter);

}  // namespace braze
