// Inside a kernel: who am I, barriers, and warp collectives.
#pragma once
#include <type_traits>

#include "language.h"

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

struct Site {
  const char* file;
  int line;
};

enum class BarrierKind { plain, count, all, any, grid };
enum class WarpOp {
  sync,
  shfl,
  shfl_up,
  shfl_down,
  shfl_xor,
  ballot,
  any,
  all,
  match_any,
  ldmatrix,
  ldmatrix_trans,
  mma_bf16,
  mma_f16,
  reduce_add,
  reduce_min,
  reduce_max,
  reduce_umin,
  reduce_umax,
  reduce_and,
  reduce_or,
  reduce_xor
};

int block_barrier(BarrierKind kind, int predicate, Site site);
uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int operand, int width,
                         Site site);
// An instruction of all 32 lanes: each has brought words in registers, and finds four there.
void warp_matrices(WarpOp op, uint32_t* registers, Site site);
unsigned active_mask();
[[noreturn]] void trap(Site site);

// A place where another thread may run next.
extern bool preemption_enabled;
void preempt();
inline void preemption_point() {
  if (preemption_enabled) preempt();
}

template <class T>
T shuffle(WarpOp op, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(op, mask, bits, operand, width, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_SITE) {
  emulator::block_barrier(emulator::BarrierKind::plain, 0, {file, line});
}
inline int __syncthreads_count(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier(emulator::BarrierKind::count, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier(emulator::BarrierKind::all, predicate, {file, line});
}
inline int __syncthreads_or(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier(emulator::BarrierKind::any, predicate, {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) {
  emulator::warp_collective(emulator::WarpOp::sync, mask, 0, 0, 32, {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(emulator::WarpOp::shfl, mask, value, lane, width, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(emulator::WarpOp::shfl_up, mask, value, static_cast<int>(delta), width,
                           {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(emulator::WarpOp::shfl_down, mask, value, static_cast<int>(delta), width,
                           {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(emulator::WarpOp::shfl_xor, mask, value, lanes, width, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return static_cast<unsigned>(emulator::warp_collective(emulator::WarpOp::ballot, mask,
                                                         predicate != 0, 0, 32, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return static_cast<int>(
      emulator::warp_collective(emulator::WarpOp::any, mask, predicate != 0, 0, 32, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return static_cast<int>(
      emulator::warp_collective(emulator::WarpOp::all, mask, predicate != 0, 0, 32, {file, line}));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATOR_SITE) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned>(
      emulator::warp_collective(emulator::WarpOp::match_any, mask, bits, 0, 32, {file, line}));
}
inline unsigned __activemask() { return emulator::active_mask(); }

#define EMULATOR_REDUCE(T, name, op)                                                     \
  inline T name(unsigned mask, T value, EMULATOR_SITE) {                                 \
    return static_cast<T>(emulator::warp_collective(                                     \
        emulator::WarpOp::op, mask, static_cast<unsigned>(value), 0, 32, {file, line})); \
  }
EMULATOR_REDUCE(int, __reduce_add_sync, reduce_add)
EMULATOR_REDUCE(unsigned, __reduce_add_sync, reduce_add)
EMULATOR_REDUCE(int, __reduce_min_sync, reduce_min)
EMULATOR_REDUCE(unsigned, __reduce_min_sync, reduce_umin)
EMULATOR_REDUCE(int, __reduce_max_sync, reduce_max)
EMULATOR_REDUCE(unsigned, __reduce_max_sync, reduce_umax)
EMULATOR_REDUCE(unsigned, __reduce_and_sync, reduce_and)
EMULATOR_REDUCE(unsigned, __reduce_or_sync, reduce_or)
EMULATOR_REDUCE(unsigned, __reduce_xor_sync, reduce_xor)
#undef EMULATOR_REDUCE

// Memory is sequentially consistent here: a missing fence is not found.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

inline void __trap(EMULATOR_SITE) { emulator::trap({file, line}); }

namespace braze::cuda {
// All threads of a cooperative launch.
inline void grid_sync(EMULATOR_SITE) {
  emulator::block_barrier(emulator::BarrierKind::grid, 0, {file, line});
}
}  // namespace braze::cuda
