// Does not compile: its parameters are more than CUDA takes.
#include "cuda/device.cuh"

struct TooLarge {
  char bytes[32768];
};
__global__ void kernel(BRAZE_GRID_CONSTANT(TooLarge)) {}

int main() {
  static TooLarge argument;
  return BRAZE_LAUNCH(kernel, 1, 1, 0, nullptr, argument);
}
