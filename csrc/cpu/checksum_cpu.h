// Checksums of memory.
#pragma once
#include <bit>
#include <cstdint>

#include "../plan/interface.h"

namespace braze::cpu {

// Different for different `value`, whatever `hash` is.
inline uint64_t mix(uint64_t hash, uint64_t value) {
  return std::rotl((hash ^ value) * 0x9e3779b97f4a7c15, 29);
}

// Of `size` bytes, with at most `threads` threads, which do not change it. Every word counts: each
// step is a bijection of what it mixes in, so that no change of one word can be lost, and several
// cancel each other once in 2^64.
BRAZE_API uint64_t checksum(const void* memory, int64_t size, int threads);

}  // namespace braze::cpu
