// Positive control for racecheck: reads a neighbour's shared cell without a barrier; "clean" has
// the barrier.
#include "control.cuh"

__global__ void rotate(int* out, bool clean) {
  __shared__ int cells[128];
  const int i = static_cast<int>(threadIdx.x);
  cells[i] = i;
  if (clean) __syncthreads();
  out[i] = cells[(i + 64) % 128];
}

int main(int argc, char** argv) {
  const bool clean = is_clean(argc, argv);
  int* out = nullptr;
  CHECK(cudaMalloc(&out, 128 * sizeof(int)));
  rotate<<<1, 128>>>(out, clean);
  return finish(out);
}
