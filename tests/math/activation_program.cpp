// math/arithmetic.h and math/activation.h against long double.
//   activation_program errors [wrong]   lines "function worst_error where"; wrong: all are spoiled
//   activation_program points X ...     lines "activation type x y dy"
#include <cstdlib>

#include "exact.h"

using namespace braze;
using exact::Worst;

namespace {

// How much results are spoiled, relatively: a positive control for every bound.
double spoiled = 0;

template <class T>
T spoil(T value) {
  return spoiled == 0 ? value : static_cast<T>(value * (1 + spoiled) + spoiled);
}

constexpr uint32_t kStride = 4093;
constexpr double kParameter = 0.25;

long double ulp(long double value) {
  const float magnitude = std::fabs(static_cast<float>(value));
  if (std::isinf(magnitude)) return 0x1p104L;
  return static_cast<long double>(std::nextafterf(magnitude, INFINITY)) - magnitude;
}

void elementary() {
  {
    Worst exp_ulps("exponential"), low("exponential_denormal");
    exact::for_floats(110, kStride, [&](float x) {
      if (x > 40) return;
      const long double want = expl(x);
      Worst& worst = static_cast<float>(want) < 0x1p-126f ? low : exp_ulps;
      worst.see(x, spoil(exponential(x)), want, ulp(want));
    });
    low.see(-200, spoil(exponential(-200.0f)), 0, 0x1p-149L);
    low.see(-INFINITY, spoil(exponential(-INFINITY)), 0, 0x1p-149L);
  }
  {
    Worst relative("small_exponential_minus_1");
    exact::for_floats(0.3465735f, kStride, [&](float r) {
      if (std::fabs(r) < 0x1p-126f) return;
      relative.see(r, spoil(small_exponential_minus_1(r)), expm1l(r), fabsl(expm1l(r)) * 0x1p-23L);
    });
  }
  {
    Worst ulps("exponential_minus_1");
    exact::for_floats(88, kStride, [&](float x) {
      ulps.see(x, spoil(exponential_minus_1(x)), expm1l(x), ulp(expm1l(x)));
    });
  }
  {
    Worst ulps("logarithm_of_1_plus");
    exact::for_floats(1, kStride, [&](float x) {
      if (x >= 0) ulps.see(x, spoil(logarithm_of_1_plus(x)), log1pl(x), ulp(log1pl(x)));
    });
  }
  {
    Worst absolute("normal_cdf");
    exact::for_floats(40, kStride, [&](float x) {
      absolute.see(x, spoil(normal_cdf(x)), exact::normal_cdf(x), 0x1p-23L);
    });
  }
  {
    Worst ulps("hyperbolic_tangent"), of_double("hyperbolic_tangent_double");
    exact::for_floats(40, kStride, [&](float x) {
      ulps.see(x, spoil(hyperbolic_tangent(x)), tanhl(x), ulp(tanhl(x)));
      const double wide = x;
      of_double.see(x, spoil(hyperbolic_tangent(wide)), tanhl(wide), ulp(tanhl(wide)) * 0x1p-29L);
    });
  }
  {
    Worst exponents("power_of_two"), reduced("reduce_exponent");
    for (int n = -126; n <= 127; ++n)
      exponents.see(n, spoil(power_of_two(n)), ldexpl(1, n), ldexpl(0x1p-24L, n));
    Worst range("reduced_range");  // in units of log(2) / 2
    exact::for_floats(128, kStride, [&](float x) {
      const auto e = reduce_exponent(x);
      range.see(x, spoil(e.r) + (spoiled == 0 ? 0 : 1), 0, logl(2) / 2);
      reduced.see(x, spoil(e.r), x - static_cast<int32_t>(e.n) * logl(2), 0x1p-24L);
    });
  }
}

// Errors of values in units of 2^-24 (2^-53) times max(1, |value|): what a float near 1 resolves.
template <Activation kA>
void activation_errors() {
  const std::string name = kActivationNames[static_cast<int>(kA)];
  Worst y(name), dy(name + "_derivative"), wide_y(name + "_double"),
      wide_dy(name + "_derivative_double");
  exact::for_floats(100, kStride, [&](float z) {
    const float parameter = static_cast<float>(kParameter);
    const long double want = exact::activation(kA, z, kParameter);
    const long double scale = fmaxl(1, fabsl(want));
    y.see(z, spoil(activate<kA>(z, parameter)), want, 0x1p-24L * scale);
    wide_y.see(z, spoil(activate<kA>(static_cast<double>(z), kParameter)), want, 0x1p-53L * scale);
    if (exact::near_kink(z)) return;
    const long double slope = exact::derivative(kA, z, kParameter);
    dy.see(z, spoil(activation_derivative<kA>(z, parameter)), slope, 0x1p-24L);
    // The difference quotient itself is good to some 1e-13.
    wide_dy.see(z, spoil(activation_derivative<kA>(static_cast<double>(z), kParameter)), slope,
                1e-12L);
  });
}

template <int... kIndex>
void all_errors(std::integer_sequence<int, kIndex...>) {
  (activation_errors<static_cast<Activation>(kIndex)>(), ...);
}

template <Activation kA, class T>
void point(const char* type, T x) {
  const T parameter = static_cast<T>(kParameter);
  std::printf("%s %s %a %a %a\n", kActivationNames[static_cast<int>(kA)], type,
              static_cast<double>(x), static_cast<double>(activate<kA>(x, parameter)),
              static_cast<double>(activation_derivative<kA>(x, parameter)));
}

template <int... kIndex>
void all_points(double x, std::integer_sequence<int, kIndex...>) {
  (point<static_cast<Activation>(kIndex)>("float", static_cast<float>(x)), ...);
  (point<static_cast<Activation>(kIndex)>("double", x), ...);
}

}  // namespace

int main(int argc, char** argv) {
  const auto all = std::make_integer_sequence<int, kNumActivations>();
  if (argc >= 2 && std::strcmp(argv[1], "errors") == 0) {
    spoiled = argc > 2 ? 0x1p-18 : 0;
    elementary();
    all_errors(all);
    return 0;
  }
  for (int i = 2; i < argc; ++i) all_points(std::strtod(argv[i], nullptr), all);
  return argc > 2 ? 0 : 2;
}
