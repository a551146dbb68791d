#include "activation.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/autograd.h>

namespace braze {

Activation activation_named(std::string_view name) {
  std::string known;
  for (int i = 0; i < kNumActivations; ++i) {
    if (kActivationNames[i] == name) return static_cast<Activation>(i);
    known.append(known.empty() ? "" : ", ").append(kActivationNames[i]);
  }
  C10_THROW_ERROR(ValueError, c10::str("activation is '", name, "'; it must be one of ", known));
}

at::Tensor activate_by_torch(const at::Tensor& z, Activation activation,
                             [[maybe_unused]] double parameter) {
  switch (activation) {
#define BRAZE_CASE(name, slope, torch) \
  case Activation::name: return torch;
    BRAZE_ACTIVATIONS(BRAZE_CASE)
#undef BRAZE_CASE
  }
  return z;
}

at::Tensor gradient_by_torch(const at::Tensor& dy, const at::Tensor& z, Activation activation,
                             double parameter) {
  if (activation == Activation::identity) return dy;
  const at::Tensor y = activate_by_torch(z, activation, parameter);
  return torch::autograd::grad({y}, {z}, {dy}, std::nullopt, true)[0];
}

}  // namespace braze
