#include "../set_begin.h"
//
#include "../activation_loops.h"
#include "../simd.h"

namespace braze::cpu::BRAZE_SET {
namespace {

template <Activation kA, class T>
void value(T* z, int64_t n, T parameter) {
  for (int64_t i = 0; i < n; i += Vec<T>::kLanes) {
    activate<kA>(Vec<T>::load(z + i), parameter).store(z + i);
  }
}

template <Activation kA, class T>
void derivative(T* z, int64_t n, T parameter) {
  for (int64_t i = 0; i < n; i += Vec<T>::kLanes) {
    activation_derivative<kA>(Vec<T>::load(z + i), parameter).store(z + i);
  }
}

template <Activation kA, class T>
void gradient(T* d, const T* z, int64_t n, T parameter) {
  for (int64_t i = 0; i < n; i += Vec<T>::kLanes) {
    activation_gradient<kA>(Vec<T>::load(d + i), Vec<T>::load(z + i), parameter).store(d + i);
  }
}

template <Activation kA, class T>
void upper(const T* z, int64_t n, uint8_t* bits) {
  for (int64_t i = 0; i < n; i += Vec<T>::kLanes) {
    store_bits<Vec<T>>(derivative_is_upper<kA>(Vec<T>::load(z + i)).bits(), bits + i / 8);
  }
}

template <Activation kA, class T>
constexpr auto upper_of() -> typename ActivationLoops<T>::Upper {
  if constexpr (has_two_slopes(kA)) return upper<kA, T>;
  return nullptr;
}

template <class T, size_t... a>
constexpr ActivationLoops<T> all(std::index_sequence<a...>) {
  return {{value<Activation{a}, T>...},
          {derivative<Activation{a}, T>...},
          {gradient<Activation{a}, T>...},
          {upper_of<Activation{a}, T>()...}};
}

}  // namespace

constexpr auto kAll = std::make_index_sequence<kNumActivations>{};
extern const Activations activations = {all<float>(kAll), all<double>(kAll)};

}  // namespace braze::cpu::BRAZE_SET
#include "../set_end.h"
