// Positive control for synccheck: __syncwarp by lanes that the mask does not name; "clean" names
// them all.
#include "control.cuh"

__global__ void sync_half(int* out, bool clean) {
  const int i = static_cast<int>(threadIdx.x);
  // Lanes 16 to 31 pass a mask that lacks them: invalid, but it does not hang.
  if (clean || i >= 16) __syncwarp(clean ? 0xffffffffu : 0x0000ffffu);
  out[i] = i;
}

int main(int argc, char** argv) {
  const bool clean = is_clean(argc, argv);
  int* out = nullptr;
  CHECK(cudaMalloc(&out, 32 * sizeof(int)));
  sync_half<<<1, 32>>>(out, clean);
  return finish(out);
}
