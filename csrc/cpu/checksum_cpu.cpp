#include "checksum_cpu.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "threads.h"

namespace braze::cpu {
namespace {

constexpr int64_t kChunk = int64_t{1} << 17;

uint64_t of_chunk(const unsigned char* bytes, int64_t size) {
  constexpr int64_t kLanes = 8;  // independent, for the multiplier's latency
  constexpr int64_t kStride = kLanes * sizeof(uint64_t);
  std::array<uint64_t, kLanes> lanes{};
  const auto mix_in = [&lanes](const unsigned char* from) {
    std::array<uint64_t, kLanes> words;
    std::memcpy(words.data(), from, kStride);
    for (size_t i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
  };
  const int64_t whole = size / kStride * kStride;
  for (int64_t i = 0; i < whole; i += kStride) mix_in(bytes + i);
  std::array<unsigned char, kStride> rest{};
  std::memcpy(rest.data(), bytes + whole, static_cast<size_t>(size - whole));
  mix_in(rest.data());
  uint64_t hash = 0;
  for (const uint64_t lane : lanes) hash = mix(hash, lane);
  return hash;
}

}  // namespace

uint64_t checksum(const void* memory, int64_t size, int threads) {
  const auto* bytes = static_cast<const unsigned char*>(memory);
  const int64_t count = (size + kChunk - 1) / kChunk;
  std::vector<uint64_t> chunks(static_cast<size_t>(count));
  threads = usable_threads(static_cast<int>(std::min<int64_t>(threads, count)));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = i * kChunk;
    chunks[static_cast<size_t>(i)] = of_chunk(bytes + offset, std::min(kChunk, size - offset));
  }
  uint64_t hash = 0;
  for (const uint64_t chunk : chunks) hash = mix(hash, chunk);
  return hash;
}

}  // namespace braze::cpu
