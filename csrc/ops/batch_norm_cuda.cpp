// The CUDA column of the launch table: batch normalisation.
#include <c10/cuda/CUDACachingAllocator.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "../cuda/batch_norm_launch.h"
#include "../cuda/zeros.h"
#include "launch.h"
#include "launch_cuda.h"

namespace braze {
namespace {

constexpr const char* kOwner = "batch_norm";
constexpr size_t kMinTickets = 4096;

// Zeros that every launch leaves as zeros, one set per stream: launches on one stream follow each
// other. A graph may be replayed on any stream, beside others: each capture has sets of its own.
class Tickets {
 public:
  // Null where the driver has no memory: torch may have some.
  unsigned int* get(int device, cudaStream_t stream, size_t count) {
    std::optional<unsigned long long> capture;
    check_launch(cuda::find_capture(stream, capture), kOwner, "a kernel", device);
    const std::lock_guard lock(mutex_);
    Set& set = sets_[{device, stream, capture.has_value()}];
    if (set.count < count || (capture && set.capture != *capture)) {
      const size_t wanted = std::max(kMinTickets, count);
      unsigned int* zeros = nullptr;
      const cudaError_t error = cuda::take_zeros(wanted, &zeros);
      if (error == cudaErrorMemoryAllocation) {
        cuda::forget_error();
        return nullptr;
      }
      check_launch(error, kOwner, "a kernel", device);
      set = {zeros, wanted, capture.value_or(0)};
    }
    return set.zeros;
  }

 private:
  struct Set {
    unsigned int* zeros = nullptr;
    size_t count = 0;
    unsigned long long capture = 0;
  };
  std::mutex mutex_;
  std::map<std::tuple<int, cudaStream_t, bool>, Set> sets_;
};

// Never destroyed: at the end of the process the driver may be gone already.
Tickets& tickets() {
  static Tickets* const instance = new Tickets;
  return *instance;
}

// The memory of one reduction.
struct Scratch {
  c10::DataPtr workspace, own_tickets;
  cuda::NormScratch pointers;

  Scratch(int device, cudaStream_t stream, const cuda::NormScratchSize& size) {
    c10::Allocator& allocator = *c10::cuda::CUDACachingAllocator::get();
    workspace = allocator.allocate(size.workspace);
    pointers.workspace = workspace.get();
    pointers.tickets = tickets().get(device, stream, size.tickets);
    if (pointers.tickets != nullptr) return;
    const size_t bytes = size.tickets * sizeof(unsigned int);
    own_tickets = allocator.allocate(bytes);
    pointers.tickets = static_cast<unsigned int*>(own_tickets.get());
    check_launch(cuda::clear(pointers.tickets, bytes, stream), kOwner, "a kernel", device);
  }
};

template <class Launch>
void run(int device, const char* what, Launch launch) {
  on_current_stream(
      device, [&](cudaStream_t stream) { check_launch(launch(stream), kOwner, what, device); });
}

// Allocates what the launch needs; it may be freed before the kernel runs, for allocations follow
// the stream.
template <class Args, class Launch>
void reduce_with(int device, const Args& args, const char* what, Launch launch) {
  run(device, what, [&](cudaStream_t stream) {
    cuda::NormScratchSize size;
    check_launch(cuda::batch_norm_scratch(args, size), kOwner, what, device);
    const Scratch scratch(device, stream, size);
    return launch(args, scratch.pointers, stream);
  });
}

}  // namespace

template <>
void launch_on_cuda(int device, const at::Tensor&, const StatisticsArgs& args) {
  reduce_with(device, args, "the statistics", cuda::batch_norm_statistics);
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const CombineArgs& args) {
  reduce_with(device, args, "the statistics", cuda::batch_norm_combine);
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const ApplyArgs& args) {
  run(device, "the forward pass",
      [&](cudaStream_t stream) { return cuda::batch_norm_apply(args, stream); });
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const RunningApplyArgs& args) {
  run(device, "the forward pass",
      [&](cudaStream_t stream) { return cuda::batch_norm_apply(args, stream); });
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const ReduceArgs& args) {
  reduce_with(device, args, "the backward pass", cuda::batch_norm_reduce);
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const CoefficientsArgs& args) {
  run(device, "the backward pass",
      [&](cudaStream_t stream) { return cuda::batch_norm_coefficients(args, stream); });
}
template <>
void launch_on_cuda(int device, const at::Tensor&, const ApplyGradArgs& args) {
  run(device, "the backward pass",
      [&](cudaStream_t stream) { return cuda::batch_norm_apply_grad(args, stream); });
}
template <>
void launch_on_cuda(int device, const at::Tensor& like, const BackwardArgs& args) {
  launch_on_cuda(device, like, ReduceArgs{args});
  if (args.writes_elements()) launch_on_cuda(device, like, ApplyGradArgs{args});
}

}  // namespace braze
