#include "fingerprint.h"

#include <algorithm>
#include <cstring>

namespace braze {
namespace {

constexpr int64_t kSamples = 64;

// One round of splitmix64: every bit of both reaches every bit of the result.
uint64_t mix(uint64_t hash, uint64_t value) {
  hash += value + 0x9e3779b97f4a7c15;
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111eb;
  return hash ^ (hash >> 31);
}

uint64_t mix_samples(uint64_t hash, const at::Tensor& tensor) {
  const auto* bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
  const auto size = static_cast<int64_t>(tensor.itemsize());
  const int64_t count = std::min(tensor.numel(), kSamples);
  for (int64_t i = 0; i < count; ++i) {
    // From the first element to the last.
    const int64_t element = count > 1 ? (tensor.numel() - 1) * i / (count - 1) : 0;
    uint64_t word = 0;
    std::memcpy(&word, bytes + element * size, static_cast<size_t>(std::min<int64_t>(size, 8)));
    hash = mix(hash, word);
  }
  return hash;
}

}  // namespace

int64_t fingerprint(const std::vector<std::optional<at::Tensor>>& tensors) {
  uint64_t hash = 0;
  for (const auto& tensor : tensors) {
    if (!tensor || !tensor->defined()) {
      hash = mix(hash, 1);
      continue;
    }
    const c10::TensorImpl* impl = tensor->unsafeGetTensorImpl();
    hash = mix(hash, reinterpret_cast<uintptr_t>(impl));
    if (!tensor->is_inference()) hash = mix(hash, static_cast<uint64_t>(tensor->_version()));
    if (tensor->layout() != c10::kStrided || !tensor->has_storage()) continue;
    const void* data = tensor->const_data_ptr();
    hash = mix(hash, reinterpret_cast<uintptr_t>(data));
    if (tensor->is_cpu() && data != nullptr && tensor->is_non_overlapping_and_dense()) {
      hash = mix_samples(hash, *tensor);
    }
  }
  return static_cast<int64_t>(hash);
}

}  // namespace braze
