// What the control programs share. Exit codes: 0 ran, 1 a CUDA call failed.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#define CHECK(call)                                                       \
  do {                                                                    \
    const cudaError_t error = (call);                                     \
    if (error != cudaSuccess) {                                           \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
      return 1;                                                           \
    }                                                                     \
  } while (false)

inline bool is_clean(int argc, char** argv) {
  return argc > 1 && std::strcmp(argv[1], "clean") == 0;
}

// The seeded bug may surface here; that is the tool's to report.
inline int finish(void* memory) {
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  CHECK(cudaFree(memory));
  return 0;
}
