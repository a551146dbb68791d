// Activations over an array, for the cases that have no loop of their own. One table per
// instruction set, shared by all operations.
#pragma once
#include <cstdint>

#include "../math/activation.h"
#include "sets.h"

namespace braze::cpu {

// Arrays are read and written in whole vectors, beyond n. [activation]
template <class T>
struct ActivationLoops {
  using Value = void (*)(T* z, int64_t n, T parameter);                 // z = activation(z)
  using Gradient = void (*)(T* d, const T* z, int64_t n, T parameter);  // d = activation_gradient
  using Upper = void (*)(const T* z, int64_t n, uint8_t* bits);         // derivative_is_upper
  Value value[kNumActivations];
  Value derivative[kNumActivations];  // z = activation'(z)
  Gradient gradient[kNumActivations];
  Upper upper[kNumActivations];  // null where the derivative is not one of two
};

struct Activations {
  ActivationLoops<float> f;
  ActivationLoops<double> d;

  template <class T>
  const ActivationLoops<T>& of() const {
    if constexpr (sizeof(T) == 8) {
      return d;
    } else {
      return f;
    }
  }
};

BRAZE_IN_SETS(extern const Activations activations;)
BRAZE_IN_BF16_SET(using avx512::activations;)

}  // namespace braze::cpu
