// Activations by name, as operators take them.
#pragma once
#include <c10/util/Exception.h>

#include <array>
#include <string>
#include <string_view>

#include "../math/activation.h"

namespace braze {

constexpr std::array<const char*, kNumActivations> kActivationNames = {
    "identity", "relu", "relu6",     "leaky_relu", "elu",         "sigmoid", "tanh",
    "silu",     "gelu", "gelu_tanh", "hardswish",  "hardsigmoid", "mish"};

inline Activation parse_activation(std::string_view name) {
  std::string known;
  for (size_t i = 0; i < kActivationNames.size(); ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
    known += std::string(i == 0 ? "" : ", ") + kActivationNames[i];
  }
  C10_THROW_ERROR(ValueError, c10::str("activation must be one of ", known, "; got '", name, "'"));
}

}  // namespace braze
