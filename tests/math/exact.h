// Activations in long double, written anew, and the table of worst errors that programs print.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "math/activation.h"

namespace exact {

using braze::Activation;

inline long double between(long double low, long double x, long double high) {
  return x < low ? low : x > high ? high : x;
}

inline long double normal_cdf(long double z) { return erfcl(-z / sqrtl(2)) / 2; }

inline long double activation(Activation which, long double z, long double parameter) {
  switch (which) {
    case Activation::identity: return z;
    case Activation::relu: return z > 0 ? z : 0;
    case Activation::relu6: return between(0, z, 6);
    case Activation::leaky_relu: return z > 0 ? z : z * parameter;
    case Activation::elu: return z > 0 ? z : parameter * expm1l(z);
    case Activation::sigmoid: return 1 / (1 + expl(-z));
    case Activation::tanh: return tanhl(z);
    case Activation::silu: return z / (1 + expl(-z));
    case Activation::gelu: return z * normal_cdf(z);
    case Activation::gelu_tanh:
      return z / 2 * (1 + tanhl(sqrtl(2 / acosl(-1)) * (z + 0.044715L * z * z * z)));
    case Activation::hardswish: return z * between(0, z + 3, 6) / 6;
    case Activation::hardsigmoid: return between(0, z + 3, 6) / 6;
    case Activation::hardtanh: return between(-1, z, 1);
    case Activation::softplus: return z > 20 ? z : log1pl(expl(z));
    case Activation::mish: return z * tanhl(log1pl(expl(z)));
  }
  return NAN;
}

// Fourth-order central difference: no formula of a derivative is written down twice.
inline long double derivative(Activation which, long double z, long double parameter) {
  const long double h = 0x1p-10L;
  const auto f = [&](long double at) { return activation(which, at, parameter); };
  return (8 * (f(z + h) - f(z - h)) - (f(z + 2 * h) - f(z - 2 * h))) / (12 * h);
}

inline bool near_kink(double z) {
  for (const double kink : {-3.0, -1.0, 0.0, 1.0, 3.0, 6.0, 20.0}) {
    if (std::fabs(z - kink) < 0.002) return true;
  }
  return false;
}

// The largest error of one function, and where.
class Worst {
 public:
  explicit Worst(std::string name) : name_(std::move(name)) {}
  ~Worst() { std::printf("%s %.4Lg %.9g\n", name_.c_str(), error_, at_); }
  Worst(const Worst&) = delete;
  Worst& operator=(const Worst&) = delete;

  // `unit`: what the error is measured in. A NaN where there is none in `want` is infinitely wrong.
  void see(double at, long double got, long double want, long double unit) {
    long double error = fabsl(got - want) / unit;
    if (std::isinf(want) || std::isnan(want))
      error = got == want || std::isnan(want) ? 0 : INFINITY;
    if (!(error <= error_)) {
      error_ = std::isnan(error) ? INFINITY : error;
      at_ = at;
    }
  }

 private:
  std::string name_;
  long double error_ = 0;
  double at_ = 0;
};

// Every exponent and both signs, evenly in the bits, up to `limit`.
template <class F>
void for_floats(float limit, uint32_t stride, F&& f) {
  for (uint32_t bits = 0; bits <= braze::bits_from_float(limit); bits += stride) {
    f(braze::float_from_bits(bits));
    f(-braze::float_from_bits(bits));
  }
}

}  // namespace exact
