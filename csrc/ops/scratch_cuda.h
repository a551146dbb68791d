// The memory that reductions need beside their tensors, and the launches that use it.
#pragma once
#include <c10/core/Allocator.h>

#include "../cuda/batch_norm_launch.h"
#include "launch_cuda.h"

namespace braze {

struct Scratch {
  Scratch(const char* owner, int device, cudaStream_t stream, const cuda::NormScratchSize& size);

  c10::DataPtr workspace, own_tickets;
  cuda::NormScratch pointers;
};

// launch(stream) on the current one.
template <class Launch>
void run_on_cuda(const char* owner, int device, const char* what, Launch launch) {
  on_current_stream(
      device, [&](cudaStream_t stream) { check_launch(launch(stream), owner, what, device); });
}

// launch(args, scratch, stream), where size_of(args, size) tells what it needs. The memory may be
// freed before the kernel runs, for allocations follow the stream.
template <class Args, class SizeOf, class Launch>
void reduce_with(const char* owner, int device, const Args& args, const char* what, SizeOf size_of,
                 Launch launch) {
  run_on_cuda(owner, device, what, [&](cudaStream_t stream) {
    cuda::NormScratchSize size;
    check_launch(size_of(args, size), owner, what, device);
    const Scratch scratch(owner, device, stream, size);
    return launch(args, scratch.pointers, stream);
  });
}

}  // namespace braze
