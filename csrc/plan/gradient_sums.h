// What one pass over gradients learns of a chunk, or of a tensor.
#pragma once
#include <cstdint>

namespace braze {

struct GradientSums {
  double squares = 0;  // of the gradients; those of fp32 are exact in a double
  double largest = 0;  // magnitude; NaN does not count
  int64_t zeros = 0, non_finite = 0;
  // Of what the step added to the parameter, and of the parameter before.
  double update_squares = 0, param_squares = 0;

  GradientSums& operator+=(const GradientSums& other) {
    squares += other.squares;
    largest = largest > other.largest ? largest : other.largest;
    zeros += other.zeros;
    non_finite += other.non_finite;
    update_squares += other.update_squares;
    param_squares += other.param_squares;
    return *this;
  }
};

}  // namespace braze
