// Philox4x32, a counter-based random number generator: a key and a counter give 128 random bits,
// the same on every machine. (Salmon, Moraes, Dror and Shaw: Parallel random numbers: as easy as
// 1, 2, 3. 2011.)
#pragma once
#include <cstdint>

#include "qualifiers.h"

namespace braze {

// What the rounds compute with: the words of one counter. The CPU's loops have types that hold
// those of several, in 64 bits a word, of which only the lower 32 count.
struct OneCounter {
  using Word = uint32_t;
  static BRAZE_INLINE uint64_t multiply(uint32_t constant, Word word) {
#if defined(__CUDA_ARCH__)  // nvcc does not see that the upper half of a wider word is 0
    return static_cast<uint64_t>(__umulhi(constant, word)) << 32 | constant * word;
#else
    return static_cast<uint64_t>(constant) * word;
#endif
  }
  // The product's upper half, xor the other two.
  static BRAZE_INLINE Word mix(uint64_t product, Word word, uint32_t key) {
    return static_cast<Word>(product >> 32) ^ word ^ key;
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
    const auto first = Counters::multiply(0xd2511f53u, c[0]);
    const auto second = Counters::multiply(0xcd9e8d57u, c[2]);
    c[0] = Counters::mix(second, c[1], key0);
    c[2] = Counters::mix(first, c[3], key1);
    c[1] = static_cast<typename Counters::Word>(second);
    c[3] = static_cast<typename Counters::Word>(first);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

}  // namespace braze
