// Compiled into every source under test (-include) of a program that can put one fault into it:
// BRAZE_FAULT is
// "<hook> <fault>". A hook's value is not computed where the fault is "zero", so that calls are
// left out.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

namespace faults {

template <size_t kSize>
struct Name {
  char text[kSize] = {};
  constexpr Name(const char (&from)[kSize]) {
    for (size_t i = 0; i < kSize; ++i) text[i] = from[i];
  }
};

// The fault of this hook, or null.
inline const char* chosen_for(const char* hook) {
  const char* const choice = getenv("BRAZE_FAULT");
  const size_t length = strlen(hook);
  const bool mine = choice != nullptr && strncmp(choice, hook, length) == 0;
  return mine && choice[length] == ' ' ? choice + length + 1 : nullptr;
}

template <Name kHook>
inline const char* const chosen = chosen_for(kHook.text);

template <class T>
T with_fault(T value, const char* fault) {
  const auto is = [&](const char* name) { return strcmp(fault, name) == 0; };
  if constexpr (std::is_arithmetic_v<T>) {
    if (is("one")) return T(1);
    if (is("plus_one")) return T(value + 1);
    if (is("minus_one")) return T(value - 1);
    if (is("twice")) return T(value + value);
    if (is("huge")) return std::numeric_limits<T>::max();
  }
  if constexpr (std::is_floating_point_v<T>) {
    if (is("positive_part")) return value > 0 ? value : T(0);
    if (is("off_by_a_thousandth")) return value * T(1.001);
  }
  if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
    if (is("last_bit_flipped")) return T(value ^ 1);
    if (is("all_bits")) return T(~T(0));
    if (strncmp(fault, "low_bits_", 9) == 0) {
      return T(value & ((uint64_t{1} << atoi(fault + 9)) - 1));
    }
  }
  fprintf(stderr, "there is no fault \"%s\" for such a value\n", fault);
  abort();
}

template <Name kHook, class Value>
auto hook(Value value) {
  using T = decltype(value());
  const char* const fault = chosen<kHook>;
  if (fault != nullptr && strcmp(fault, "zero") == 0) return T();
  if constexpr (std::is_void_v<T>) {
    value();
  } else {
    return fault == nullptr ? value() : with_fault<T>(value(), fault);
  }
}

}  // namespace faults

#define BRAZE_HOOK(name, ...) ::faults::hook<#name>([&] { return __VA_ARGS__; })
