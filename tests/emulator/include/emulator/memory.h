// Inside a kernel: shared memory, 16-byte accesses, cache-hinted accesses, atomics.
#pragma once
#include <type_traits>

#include "threads.h"

namespace emulator {

// The block's storage for the call site `key`, filled with 0xff at block start.
void* shared_cell(const void* key, size_t bytes, size_t alignment);
// The launch's dynamic shared memory, aligned to 128 bytes; null if it has none.
void* dynamic_shared();

typedef unsigned int Vector16 __attribute__((vector_size(16), may_alias));

}  // namespace emulator

#define BRAZE_GRID_CONSTANT(type) const type&

// A heap cell of its own per call site and block, so that an index too far is found.
#define BRAZE_SHARED(type, name, count)              \
  static char braze_shared_key_##name;               \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      emulator::shared_cell(&braze_shared_key_##name, sizeof(type[count]), alignof(type)))

#define BRAZE_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulator::dynamic_shared())

namespace braze::cuda {

inline uint4 load16(const void* address) {
  // A vector type: one access for the sanitizers, checked for alignment.
  const emulator::Vector16 value = *static_cast<const emulator::Vector16*>(address);
  return uint4{value[0], value[1], value[2], value[3]};
}
inline void store16(void* address, uint4 value) {
  *static_cast<emulator::Vector16*>(address) =
      emulator::Vector16{value.x, value.y, value.z, value.w};
}

}  // namespace braze::cuda

namespace emulator {

template <class T>
T load(const T* address) {
  if constexpr (sizeof(T) == 16 && std::is_trivially_copyable_v<T>) {
    const uint4 bits = braze::cuda::load16(address);
    T value;
    memcpy(static_cast<void*>(&value), &bits, 16);
    return value;
  } else {
    return *address;
  }
}
template <class T>
void store(T* address, T value) {
  if constexpr (sizeof(T) == 16 && std::is_trivially_copyable_v<T>) {
    uint4 bits;
    memcpy(&bits, &value, 16);
    braze::cuda::store16(address, bits);
  } else {
    *address = value;
  }
}

}  // namespace emulator

#define EMULATOR_LOAD(name)                              \
  template <class T>                                     \
  inline std::remove_cv_t<T> name(T* address) {          \
    return emulator::load<std::remove_cv_t<T>>(address); \
  }
#define EMULATOR_STORE(name)                                    \
  template <class T>                                            \
  inline void name(T* address, std::type_identity_t<T> value) { \
    emulator::store<T>(address, value);                         \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwt)
#undef EMULATOR_LOAD
#undef EMULATOR_STORE

namespace emulator {

// Acquire and release, as with the __threadfence that last-block-done puts around them.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  preemption_point();
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>>;
  static_assert(sizeof(T) == sizeof(Bits));
  typedef Bits Alias __attribute__((may_alias));
  Alias* bits = reinterpret_cast<Alias*>(address);
  Bits seen = __atomic_load_n(bits, __ATOMIC_ACQUIRE);
  for (;;) {
    T old;
    memcpy(&old, &seen, sizeof(T));
    const T updated = update(old);
    Bits wanted;
    memcpy(&wanted, &updated, sizeof(T));
    if (__atomic_compare_exchange_n(bits, &seen, wanted, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE)) {
      return old;
    }
  }
}

}  // namespace emulator

#define EMULATOR_ATOMIC(T, name, expression)                                                    \
  inline T name(T* address, T value) {                                                          \
    return emulator::atomic_update(address,                                                     \
                                   [value](T old) -> T { return static_cast<T>(expression); }); \
  }
// Signed sums wrap, as the hardware's do.
EMULATOR_ATOMIC(int, atomicAdd, static_cast<unsigned>(old) + static_cast<unsigned>(value))
EMULATOR_ATOMIC(int, atomicSub, static_cast<unsigned>(old) - static_cast<unsigned>(value))
EMULATOR_ATOMIC(unsigned, atomicAdd, old + value)
EMULATOR_ATOMIC(unsigned, atomicSub, old - value)
EMULATOR_ATOMIC(unsigned long long, atomicAdd, old + value)
EMULATOR_ATOMIC(float, atomicAdd, old + value)
EMULATOR_ATOMIC(double, atomicAdd, old + value)
EMULATOR_ATOMIC(unsigned, atomicInc, old >= value ? 0 : old + 1)
EMULATOR_ATOMIC(unsigned, atomicDec, old == 0 || old > value ? value : old - 1)
EMULATOR_ATOMIC(float, atomicExch, ((void)old, value))
#define EMULATOR_ATOMICS(T)                                                                   \
  EMULATOR_ATOMIC(T, atomicMax, old < value ? value : old)                                    \
  EMULATOR_ATOMIC(T, atomicMin, value < old ? value : old)                                    \
  EMULATOR_ATOMIC(T, atomicExch, ((void)old, value))                                          \
  EMULATOR_ATOMIC(T, atomicAnd, old& value)                                                   \
  EMULATOR_ATOMIC(T, atomicOr, old | value)                                                   \
  EMULATOR_ATOMIC(T, atomicXor, old ^ value)                                                  \
  inline T atomicCAS(T* address, T compare, T value) {                                        \
    return emulator::atomic_update(address,                                                   \
                                   [=](T old) -> T { return old == compare ? value : old; }); \
  }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(long long)
EMULATOR_ATOMICS(unsigned long long)
#undef EMULATOR_ATOMIC
#undef EMULATOR_ATOMICS
inline unsigned short atomicCAS(unsigned short* address, unsigned short compare,
                                unsigned short value) {
  return emulator::atomic_update(address,
                                 [=](unsigned short old) { return old == compare ? value : old; });
}
