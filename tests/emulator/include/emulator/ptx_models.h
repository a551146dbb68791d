// What csrc/cuda/ptx.cuh names, on the CPU: written from the PTX ISA's tables. A mistake made in
// both a load and the multiplication could hide; tests/cuda/test_ptx_models.py has the bit patterns
// to compare on a GPU.
#pragma once
#include <cmath>

#include "hooks.h"
#include "memory.h"
#include "threads.h"

namespace emulator {

// The calling thread's copies under way.
void async_copy(void* to, const void* from);
void async_copy_commit();
// The next one that must be there when `pending` groups may be under way; false: no more.
bool async_copy_landing(int pending, void** to, const void** from);

}  // namespace emulator

namespace braze::cuda {

inline void store16_shared(void* address, uint4 value) { store16(address, value); }

inline unsigned int atomic_add_acq_rel(unsigned int* counter, unsigned int value) {
  return atomicAdd(counter, value);
}

inline uint32_t computed_here(uint32_t value) { return value; }
inline void* flip_shared(const void* address, uint32_t bits) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(address) ^ bits);
}

template <class Round>
inline uint32_t relu_pair(float first, float second, Round round) {
  const auto one = [&](float value) -> uint32_t {
    return value != value ? 0x7fffu : value > 0 ? round(value) : 0u;
  };
  return one(first) | one(second) << 16;
}
inline uint32_t relu_pair_bf16(float first, float second) {
  return relu_pair(first, second, [](float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  });
}
inline uint32_t relu_pair_f16(float first, float second) {
  return relu_pair(first, second, [](float value) {
    if (value >= 65520.0f) return 0x7c00u;
    const int exponent = std::ilogb(value) < -14 ? -14 : std::ilogb(value);
    const float units = std::nearbyint(std::ldexp(value, 10 - exponent));
    return static_cast<uint32_t>(exponent + 14) * 1024 + static_cast<uint32_t>(units);
  });
}

// As late as the hardware may: until the wait the destination is rubbish, and the source is read
// only then. A copy counts where it is started.
inline void cp_async16_or_zero(void* shared, const void* global, bool copy) {
  alignas(16) static const unsigned char zeros[16] = {};
  store16(shared, uint4{~0u, ~0u, ~0u, ~0u});
  // A wrong address is found here. Volatile, or compilers leave out what nobody uses.
  if (copy) (void)*static_cast<const volatile emulator::Vector16*>(global);
  emulator::async_copy(shared, copy ? global : zeros);
}
inline void cp_async16(void* shared, const void* global) {
  cp_async16_or_zero(shared, global, true);
}
inline void cp_async_commit() { emulator::async_copy_commit(); }
template <int kPending>
inline void cp_async_wait() {
  [[maybe_unused]] const emulator::Uncounted landing{};
  void* to = nullptr;
  const void* from = nullptr;
  while (emulator::async_copy_landing(kPending, &to, &from)) store16(to, load16(from));
}

// Each lane reads the row that it names: a request of the warp is four matrices, in their order.
inline void ldmatrix(emulator::WarpOp op, const void* row, uint32_t (&out)[4],
                     emulator::Site site) {
  const uint4 bits = load16(row);
  memcpy(out, &bits, sizeof(out));
  emulator::warp_matrices(op, out, site);
}
inline void ldmatrix_x4(const void* row, uint32_t (&out)[4], EMULATOR_SITE) {
  ldmatrix(emulator::WarpOp::ldmatrix, row, out, {file, line});
}
inline void ldmatrix_x4_trans(const void* row, uint32_t (&out)[4], EMULATOR_SITE) {
  ldmatrix(emulator::WarpOp::ldmatrix_trans, row, out, {file, line});
}

inline void mma_m16n8k16(emulator::WarpOp op, float (&c)[4], const uint32_t (&a)[4],
                         const uint32_t (&b)[2], emulator::Site site) {
  uint32_t registers[10] = {0, 0, 0, 0, a[0], a[1], a[2], a[3], b[0], b[1]};
  memcpy(registers, c, sizeof(c));
  emulator::warp_matrices(op, registers, site);
  memcpy(c, registers, sizeof(c));
}
inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              EMULATOR_SITE) {
  mma_m16n8k16(emulator::WarpOp::mma_bf16, c, a, b, {file, line});
}
inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             EMULATOR_SITE) {
  mma_m16n8k16(emulator::WarpOp::mma_f16, c, a, b, {file, line});
}

}  // namespace braze::cuda
