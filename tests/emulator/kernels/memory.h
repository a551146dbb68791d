// Counting the memory requests of one launch, with names for the buffers that it is given.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/device.cuh"
#include "emulator/hooks.h"
#include "math/dtype.h"

// Zeros; `phase`: bytes that they start beyond a multiple of 16.
inline char* device_memory(const char* name, size_t bytes, size_t phase = 0) {
  void* memory = nullptr;
  if (cudaMalloc(&memory, bytes + phase) != cudaSuccess) abort();
  memset(memory, 0, bytes + phase);
  emulator::name_memory(name, memory, bytes + phase);
  return static_cast<char*>(memory) + phase;
}

template <class Launch>
void count(const std::string& name, Launch launch) {
  emulator::count_memory(true);
  const cudaError_t error = launch();
  emulator::count_memory(false);
  if (error != cudaSuccess) {
    printf("%s: %s\n", name.c_str(), cudaGetErrorString(error));
    exit(1);
  }
  emulator::print_memory_counts(name.c_str());
}

inline size_t size_of(braze::DType dtype) {
  return dtype == braze::DType::f64 ? 8 : dtype == braze::DType::f32 ? 4 : 2;
}
