// What csrc/cuda/ptx.cuh names, on the CPU: written from the PTX ISA's tables. A mistake made in
// both a load and the multiplication could hide; tests/cuda/test_ptx_models.py has the bit patterns
// to compare on a GPU.
#pragma once
#include "memory.h"
#include "threads.h"

namespace emulator {

// The calling thread's copies under way.
void async_copy(void* to, const void* from);
void async_copy_commit();
// The next one that must be there when `pending` groups may be under way; false: no more.
bool async_copy_landing(int pending, void** to, const void** from);

inline int lane() {
  const unsigned row = threadIdx.y + blockDim.y * threadIdx.z;
  return static_cast<int>((threadIdx.x + blockDim.x * row) % 32);
}
inline float bf16_of(uint32_t word, int half) {
  const uint32_t bits = half ? word & 0xffff0000u : word << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float f16_of(uint32_t word, int half) {
  _Float16 value;
  const auto bits = static_cast<uint16_t>(half ? word >> 16 : word);
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace emulator

namespace braze::cuda {

inline void store16_shared(void* address, uint4 value) { store16(address, value); }

inline unsigned int atomic_add_acq_rel(unsigned int* counter, unsigned int value) {
  return atomicAdd(counter, value);
}

inline int computed_here(int value) { return value; }

// As late as the hardware may: until the wait the destination is rubbish, and the source is read
// only then.
inline void cp_async16(void* shared, const void* global) {
  store16(shared, uint4{~0u, ~0u, ~0u, ~0u});
  (void)load16(global);  // a wrong address is found here
  emulator::async_copy(shared, global);
}
inline void cp_async16_or_zero(void* shared, const void* global, bool copy) {
  alignas(16) static const unsigned char zeros[16] = {};
  if (copy) return cp_async16(shared, global);
  store16(shared, uint4{~0u, ~0u, ~0u, ~0u});
  emulator::async_copy(shared, zeros);
}
inline void cp_async_commit() { emulator::async_copy_commit(); }
template <int kPending>
inline void cp_async_wait() {
  void* to = nullptr;
  const void* from = nullptr;
  while (emulator::async_copy_landing(kPending, &to, &from)) store16(to, load16(from));
}

inline void ldmatrix_x4(const void* row, uint32_t (&out)[4], EMULATOR_SITE) {
  const int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const auto address =
        __shfl_sync(~0u, reinterpret_cast<uint64_t>(row), 8 * i + lane / 4, 32, file, line);
    const uint4 bits = load16(reinterpret_cast<const void*>(address));
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    out[i] = words[lane % 4];
  }
}

inline void ldmatrix_x4_trans(const void* row, uint32_t (&out)[4], EMULATOR_SITE) {
  const int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    out[i] = 0;
    for (int half = 0; half < 2; ++half) {
      const auto address = __shfl_sync(~0u, reinterpret_cast<uint64_t>(row),
                                       8 * i + 2 * (lane % 4) + half, 32, file, line);
      const uint4 bits = load16(reinterpret_cast<const void*>(address));
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
      const int column = lane / 4;
      out[i] |= (words[column / 2] >> (16 * (column % 2)) & 0xffffu) << (16 * half);
    }
  }
}

// Exact products, summed in double and rounded once: the hardware rounds otherwise, within a few
// units in the last place of the largest term.
template <float (*kValue)(uint32_t, int)>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const char* file, int line) {
  const int lane = emulator::lane();
  const int g = lane / 4, t = lane % 4;
  double sums[4] = {c[0], c[1], c[2], c[3]};
  // The other lanes' registers are read where they are, until all have done so.
  const auto of_lane = [&](const uint32_t* registers, int from) {
    return reinterpret_cast<const uint32_t*>(
        __shfl_sync(~0u, reinterpret_cast<uint64_t>(registers), from, 32, file, line));
  };
  // Quad q of a row or column holds its k = 2q, 2q+1, 2q+8, 2q+9.
  for (int q = 0; q < 4; ++q) {
    const uint32_t* const rows = of_lane(a, 4 * g + q);
    const uint32_t* const columns[2] = {of_lane(b, 4 * 2 * t + q), of_lane(b, 4 * (2 * t + 1) + q)};
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < 2; ++k) {
        for (int half = 0; half < 2; ++half) {
          sums[i] += static_cast<double>(kValue(rows[i / 2 + 2 * k], half)) *
                     kValue(columns[i % 2][k], half);
        }
      }
    }
  }
  __syncwarp(~0u, file, line);
  for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(sums[i]);
}
inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              EMULATOR_SITE) {
  mma_m16n8k16<emulator::bf16_of>(c, a, b, file, line);
}
inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             EMULATOR_SITE) {
  mma_m16n8k16<emulator::f16_of>(c, a, b, file, line);
}

}  // namespace braze::cuda
