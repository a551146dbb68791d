#include <algorithm>
#include <cstring>

#include "../math/hook.h"
#include "device_table.h"

namespace braze::cuda {
namespace {

// So many uploads may be in flight before one waits for the oldest: far more than a stream queues.
constexpr size_t kMaxStaging = 256;
constexpr size_t kCompareBlock = 256;

#define BRAZE_TRY(call)                                           \
  do {                                                            \
    if (const cudaError_t error = (call); error != cudaSuccess) { \
      return error;                                               \
    }                                                             \
  } while (false)

}  // namespace

// Errors are ignored: at the end of the process the driver may be gone already.
DeviceTable::~DeviceTable() {
  for (const Staging& staging : staging_) {
    if (staging.copied != nullptr) {
      (void)cudaEventSynchronize(staging.copied);
      (void)cudaEventDestroy(staging.copied);
    }
    if (staging.host != nullptr) (void)cudaFreeHost(staging.host);
  }
  if (used_ != nullptr) (void)cudaEventDestroy(used_);
  if (device_ != nullptr) (void)cudaFree(device_);  // waits for the work that reads it
  (void)cudaGetLastError();
}

char* DeviceTable::image(size_t bytes) {
  image_.resize(bytes);
  return image_.data();
}

cudaError_t DeviceTable::grow(size_t bytes) {
  size_t capacity = std::max<size_t>(capacity_, 1 << 16);
  while (capacity < bytes) capacity *= 2;
  char* device = nullptr;
  BRAZE_TRY(cudaMalloc(reinterpret_cast<void**>(&device), capacity));
  if (device_ != nullptr) (void)cudaFree(device_);
  device_ = device;
  capacity_ = capacity;
  BRAZE_HOOK(forget_uploaded, uploaded_.clear());
  return cudaSuccess;
}

cudaError_t DeviceTable::take_staging(size_t bytes, Staging*& result) {
  for (size_t tried = 0; tried < staging_.size(); ++tried) {
    Staging& staging = staging_[(next_staging_ + tried) % staging_.size()];
    if (BRAZE_HOOK(small_staging, staging.capacity < bytes)) continue;
    const cudaError_t state = BRAZE_HOOK(copy_state, cudaEventQuery(staging.copied));
    if (state == cudaErrorNotReady) {
      (void)cudaGetLastError();
      if (BRAZE_HOOK(room_for_staging, staging_.size() < kMaxStaging)) continue;
      BRAZE_TRY(cudaEventSynchronize(staging.copied));
    } else if (state != cudaSuccess) {
      return state;
    }
    next_staging_ = (next_staging_ + tried + 1) % staging_.size();
    result = &staging;
    return cudaSuccess;
  }
  Staging staging;
  staging.capacity = std::max<size_t>(capacity_, bytes);
  BRAZE_TRY(cudaMallocHost(reinterpret_cast<void**>(&staging.host), staging.capacity));
  if (const cudaError_t error = cudaEventCreateWithFlags(&staging.copied, cudaEventDisableTiming);
      error != cudaSuccess) {
    (void)cudaFreeHost(staging.host);
    return error;
  }
  staging_.push_back(staging);
  result = &staging_.back();
  return cudaSuccess;
}

cudaError_t DeviceTable::upload(cudaStream_t stream) {
  bytes_uploaded_ = 0;
  if (capacity_ < image_.size()) BRAZE_TRY(grow(image_.size()));
  if (used_ == nullptr) BRAZE_TRY(cudaEventCreateWithFlags(&used_, cudaEventDisableTiming));
  if (BRAZE_HOOK(other_stream, in_use_ && stream != last_stream_))
    BRAZE_TRY(cudaStreamWaitEvent(stream, used_, 0));
  const size_t bytes = image_.size(), known = std::min(bytes, uploaded_.size());
  const auto same = [&](size_t begin) {
    const size_t end = std::min(begin + kCompareBlock, bytes);
    return end <= known && memcmp(&image_[begin], &uploaded_[begin], end - begin) == 0;
  };
  size_t begin = 0;
  while (begin < bytes && same(begin)) begin += BRAZE_HOOK(compare_stride, kCompareBlock);
  if (begin >= bytes) return cudaSuccess;
  size_t last = (bytes - 1) / kCompareBlock * kCompareBlock;
  while (last > begin && same(last)) last -= kCompareBlock;
  const size_t length = std::min(last + BRAZE_HOOK(last_block, kCompareBlock), bytes) - begin;
  Staging* staging = nullptr;
  BRAZE_TRY(take_staging(length, staging));
  memcpy(staging->host, &image_[begin], length);
  // What lies behind is unknown until the copy is on its way.
  uploaded_.resize(std::min(known, BRAZE_HOOK(known_begin, begin)));
  BRAZE_TRY(
      cudaMemcpyAsync(device_ + begin, staging->host, length, cudaMemcpyHostToDevice, stream));
  uploaded_ = image_;
  bytes_uploaded_ = length;
  // Whatever becomes of the launch, other streams must see this copy.
  BRAZE_HOOK(mark_copied, (void)mark_read(stream));
  const cudaError_t error = cudaEventRecord(staging->copied, stream);
  // The event would call the staging memory free while it is still read.
  if (error != cudaSuccess) BRAZE_HOOK(wait_for_copy, (void)cudaStreamSynchronize(stream));
  return error;
}

cudaError_t DeviceTable::mark_read(cudaStream_t stream) {
  last_stream_ = stream;
  const cudaError_t error = cudaEventRecord(used_, stream);
  in_use_ = error == cudaSuccess;
  if (!in_use_) (void)cudaStreamSynchronize(stream);
  return error;
}

}  // namespace braze::cuda
