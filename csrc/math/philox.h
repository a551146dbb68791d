// Philox4x32, a counter-based random number generator: a key and a counter give 128 random bits,
// the same on every machine. (Salmon, Moraes, Dror and Shaw: Parallel random numbers: as easy as
// 1, 2, 3. 2011.)
#pragma once
#include <cstdint>

#include "qualifiers.h"

namespace braze {

// What the rounds compute with: the words of one counter. The CPU's loops have types that hold
// those of several. Only the lower 32 bits of a word count.
struct OneCounter {
  using Word = uint64_t;
  static BRAZE_INLINE Word multiply(uint32_t constant, Word word) {
    return static_cast<uint64_t>(constant) * static_cast<uint32_t>(word);
  }
  // The product's upper half, xor the other two.
  static BRAZE_INLINE Word mix(Word product, Word word, uint32_t key) {
    return (product >> 32) ^ word ^ key;
  }
};

// Turns a counter, low word first, into random words.
template <int kRounds, class Counters>
BRAZE_INLINE void philox4x32(typename Counters::Word (&c)[4], uint32_t key0, uint32_t key1) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kRounds; ++round) {
    const typename Counters::Word first = Counters::multiply(0xd2511f53u, c[0]);
    const typename Counters::Word second = Counters::multiply(0xcd9e8d57u, c[2]);
    c[0] = Counters::mix(second, c[1], key0);
    c[2] = Counters::mix(first, c[3], key1);
    c[1] = second;
    c[3] = first;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

}  // namespace braze
