#include "scratch_cuda.h"

#include <c10/cuda/CUDACachingAllocator.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "../cuda/zeros.h"

namespace braze {
namespace {

constexpr size_t kMinTickets = 4096;

// Zeros that every launch leaves as zeros, one set per stream: launches on one stream follow each
// other. A graph may be replayed on any stream, beside others: each capture has sets of its own.
class Tickets {
 public:
  // Null where the driver has no memory: torch may have some.
  unsigned int* get(const char* owner, int device, cudaStream_t stream, size_t count) {
    std::optional<unsigned long long> capture;
    check_launch(cuda::find_capture(stream, capture), owner, "a kernel", device);
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
      check_launch(error, owner, "a kernel", device);
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

}  // namespace

Scratch::Scratch(const char* owner, int device, cudaStream_t stream,
                 const cuda::NormScratchSize& size) {
  c10::Allocator& allocator = *c10::cuda::CUDACachingAllocator::get();
  workspace = allocator.allocate(size.workspace);
  pointers.workspace = workspace.get();
  pointers.tickets = tickets().get(owner, device, stream, size.tickets);
  if (pointers.tickets != nullptr) return;
  const size_t bytes = size.tickets * sizeof(unsigned int);
  own_tickets = allocator.allocate(bytes);
  pointers.tickets = static_cast<unsigned int*>(own_tickets.get());
  check_launch(cuda::clear(pointers.tickets, bytes, stream), owner, "a kernel", device);
}

}  // namespace braze
