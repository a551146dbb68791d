// The last of a launch's blocks to come to a place: it may finish what all have done.
#pragma once
#include "../math/hook.h"
#include "ptx.cuh"

namespace braze::cuda {

// True in all threads of the last of `blocks` blocks that come here, once each; the others' writes
// to memory before it are visible then, and what they have read may be written. The ticket is zero
// before and after.
__device__ __forceinline__ bool is_last_block(unsigned int* ticket, uint32_t blocks) {
  BRAZE_SHARED(bool, last, 1);
  __syncthreads();  // all threads of this block have read and written
  if (threadIdx.x == 0) {
    last[0] = atomic_add_acq_rel(ticket, 1u) == BRAZE_HOOK(other_blocks, blocks - 1);
    if (BRAZE_HOOK(reset_ticket, last[0])) *ticket = 0;
  }
  __syncthreads();
  return last[0];
}

}  // namespace braze::cuda
