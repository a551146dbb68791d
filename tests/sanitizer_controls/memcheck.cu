// Positive control for memcheck: writes one element past the end; "clean" does not.
#include "control.cuh"

__global__ void fill(int* out, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) out[i] = i;
}

int main(int argc, char** argv) {
  constexpr int kSize = 33;
  const bool clean = is_clean(argc, argv);
  int* out = nullptr;
  CHECK(cudaMalloc(&out, kSize * sizeof(int)));
  fill<<<1, 64>>>(out, clean ? kSize : kSize + 1);
  return finish(out);
}
