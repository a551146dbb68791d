#include <algorithm>
#include <mutex>
#include <vector>

#include "../math/hook.h"
#include "zeros.h"

namespace braze::cuda {
namespace {

constexpr size_t kSlabWords = size_t{1} << 18;
constexpr size_t kLineWords = 32;  // no two users share a line of memory

struct Slab {
  unsigned int* free = nullptr;
  size_t words = 0;
};

// Allocating and waiting would otherwise invalidate what this thread or others capture.
class BesideCaptures {
 public:
  BesideCaptures() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { BRAZE_HOOK(restore_mode, (void)cudaThreadExchangeStreamCaptureMode(&mode_)); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = BRAZE_HOOK(capture_mode, cudaStreamCaptureModeRelaxed);
};

// A stream of its own: the wait is for the fill alone, and then all streams see zeros.
cudaError_t fill(unsigned int* memory, size_t words) {
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  error = BRAZE_HOOK(fill_zeros, cudaMemsetAsync(memory, 0, words * sizeof(unsigned int), stream));
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  (void)cudaStreamDestroy(stream);
  return error;
}

cudaError_t replace(Slab& slab, size_t words) {
  const BesideCaptures relaxed;
  unsigned int* memory = nullptr;
  cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&memory), words * sizeof(unsigned int));
  if (error != cudaSuccess) return error;
  error = fill(memory, words);
  if (error != cudaSuccess) {
    (void)cudaFree(memory);
    return error;
  }
  slab = {memory, words};
  return cudaSuccess;
}

}  // namespace

cudaError_t take_zeros(size_t words, unsigned int** zeros) {
  // Never destroyed: at the end of the process the driver may be gone already.
  static auto* const mutex = new std::mutex;
  static auto* const slabs = new std::vector<Slab>;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  words = (words + kLineWords - 1) / kLineWords * kLineWords;
  const std::lock_guard lock(*mutex);
  const auto index = static_cast<size_t>(device);
  if (slabs->size() <= index) slabs->resize(index + 1);
  Slab& slab = (*slabs)[index];
  if (slab.words < words) {
    const cudaError_t error = replace(slab, std::max(kSlabWords, words));
    if (error != cudaSuccess) return error;
  }
  *zeros = slab.free;
  slab.free += BRAZE_HOOK(taken_words, words);
  slab.words -= words;
  return cudaSuccess;
}

}  // namespace braze::cuda
