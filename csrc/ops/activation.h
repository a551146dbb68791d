// Activations by name.
#pragma once
#include <c10/util/Exception.h>

#include <array>
#include <string>
#include <string_view>

#include "../math/activation.h"

namespace braze {

constexpr std::array<std::string_view, kNumActivations> kActivationNames = {
    "identity", "relu", "relu6",     "leaky_relu", "elu",         "sigmoid", "tanh",
    "silu",     "gelu", "gelu_tanh", "hardswish",  "hardsigmoid", "mish"};

// Raises ValueError for any other name.
inline Activation activation_named(std::string_view name) {
  for (size_t i = 0; i < kActivationNames.size(); ++i) {
    if (kActivationNames[i] == name) return static_cast<Activation>(i);
  }
  std::string known;
  for (const std::string_view other : kActivationNames) {
    known.append(known.empty() ? "" : ", ").append(other);
  }
  TORCH_CHECK_VALUE(false, "activation is '", name, "'; it must be one of ", known);
}

}  // namespace braze
