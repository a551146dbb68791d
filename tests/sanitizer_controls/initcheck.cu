// Positive control for initcheck: reads global memory that nobody wrote; "clean" clears it first.
#include "control.cuh"

__global__ void add_one(const int* in, int* out) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = in[i] + 1;
}

int main(int argc, char** argv) {
  const bool clean = is_clean(argc, argv);
  int *in = nullptr, *out = nullptr;
  CHECK(cudaMalloc(&in, 64 * sizeof(int)));
  CHECK(cudaMalloc(&out, 64 * sizeof(int)));
  if (clean) CHECK(cudaMemset(in, 0, 64 * sizeof(int)));
  add_one<<<1, 64>>>(in, out);
  const int code = finish(out);
  return cudaFree(in) == cudaSuccess ? code : 1;
}
