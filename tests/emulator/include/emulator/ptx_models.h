// What csrc/cuda/ptx.cuh names, on the CPU; store16 is in memory.h.
#pragma once
#include "memory.h"
#include "threads.h"

namespace braze::cuda {

inline unsigned int atomic_add_acq_rel(unsigned int* counter, unsigned int value) {
  return atomicAdd(counter, value);
}

}  // namespace braze::cuda
