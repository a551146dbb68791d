#include "fingerprint.h"

#include <ATen/Parallel.h>

#include <array>
#include <bit>
#include <cstring>

namespace braze {
namespace {

constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;

// Different for different `value`, whatever `hash` is.
uint64_t mix(uint64_t hash, uint64_t value) { return std::rotl((hash ^ value) * kOdd, 29); }

// Every word counts: each step is a bijection of what it mixes in, so that no change of one word
// can be lost, and several cancel each other once in 2^64. Independent lanes, for the multiplier's
// latency.
uint64_t mix_bytes(uint64_t hash, const unsigned char* bytes, int64_t size) {
  constexpr int kLanes = 8;
  constexpr int64_t kStride = kLanes * sizeof(uint64_t);
  std::array<uint64_t, kLanes> lanes{};
  const auto mix_in = [&lanes](const unsigned char* from) {
    for (int i = 0; i < kLanes; ++i) {
      uint64_t word;
      std::memcpy(&word, from + i * sizeof(word), sizeof(word));
      lanes[i] = mix(lanes[i], word);
    }
  };
  const int64_t whole = size / kStride * kStride;
  for (int64_t i = 0; i < whole; i += kStride) mix_in(bytes + i);
  std::array<unsigned char, kStride> rest{};
  std::memcpy(rest.data(), bytes + whole, static_cast<size_t>(size - whole));
  mix_in(rest.data());
  for (const uint64_t lane : lanes) hash = mix(hash, lane);
  return hash;
}

uint64_t mix_memory(uint64_t hash, const at::Tensor& tensor) {
  constexpr int64_t kChunk = int64_t{1} << 17;
  const auto* bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
  const auto size = static_cast<int64_t>(tensor.nbytes());
  std::vector<uint64_t> chunks(static_cast<size_t>((size + kChunk - 1) / kChunk));
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = i * kChunk;
      chunks[static_cast<size_t>(i)] =
          mix_bytes(0, bytes + offset, std::min(kChunk, size - offset));
    }
  });
  for (const uint64_t chunk : chunks) hash = mix(hash, chunk);
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
    if (tensor->is_cpu() && data != nullptr) {
      const bool dense = tensor->is_non_overlapping_and_dense();
      hash = mix_memory(hash, dense ? *tensor : tensor->contiguous());
    }
  }
  return static_cast<int64_t>(hash);
}

}  // namespace braze
