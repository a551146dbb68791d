// Plain loops, one element after the other: to be replaced by fast ones.
#include "batch_norm_cpu.h"

#include "../math/batch_norm.h"
#include "../math/convert.h"

namespace braze::cpu {
namespace {

double get(const void* p, DType d, int64_t i) {
  switch (d) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::bf16: return from_storage(static_cast<const Bf16*>(p)[i]);
    default: return from_storage(static_cast<const F16*>(p)[i]);
  }
}
void put(void* p, DType d, int64_t i, double v) {
  switch (d) {
    case DType::f32: static_cast<float*>(p)[i] = static_cast<float>(v); return;
    case DType::f64: static_cast<double*>(p)[i] = v; return;
    case DType::bf16: to_storage(static_cast<float>(v), static_cast<Bf16*>(p)[i]); return;
    default: to_storage(static_cast<float>(v), static_cast<F16*>(p)[i]); return;
  }
}
DType arith(const ActivationShape& s) { return s.dtype == DType::f64 ? DType::f64 : DType::f32; }
int64_t at(const ActivationShape& s, int64_t n, int64_t c, int64_t i) {
  return s.channels_last ? (n * s.spatial + i) * s.c + c : (n * s.c + c) * s.spatial + i;
}
template <class F>
void each(const ActivationShape& s, int64_t c, F f) {
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t i = 0; i < s.spatial; ++i) {
      const int64_t row = s.channels_last ? n * s.spatial + i : n * s.c + c;
      const int64_t column = s.channels_last ? c : i;
      f(at(s, n, c, i), row * ((s.row() + 7) / 8) + column / 8, static_cast<int>(column % 8));
    }
}
BatchNormStats<double> load(const void* stats, const ActivationShape& s, int64_t c) {
  const auto g = [&](int r) { return get(stats, arith(s), r * s.c + c); };
  return {g(0), g(1), g(2), g(3), g(4)};
}
void finish(const ActivationShape& s, int64_t c, const BatchNormChannels& ch,
            const ChannelMoments& m, void* stats, double momentum) {
  const double w = ch.weight ? get(ch.weight, ch.param_dtype, c) : 1,
               b = ch.bias ? get(ch.bias, ch.param_dtype, c) : 0;
  const auto store = [&](auto st) {
    const double v[] = {double(st.mean), double(st.mean_low), double(st.invstd), double(st.scale),
                        double(st.shift)};
    for (int r = 0; r < 5; ++r) put(stats, arith(s), r * s.c + c, v[r]);
  };
  if (s.dtype == DType::f64)
    store(make_stats<double>(m.mean, variance_of(m), ch.eps, w, b));
  else
    store(make_stats<float>(m.mean, variance_of(m), ch.eps, w, b));
  if (ch.running_mean && m.count > 1) {
    put(ch.running_mean, ch.running_dtype, c,
        update_running(get(ch.running_mean, ch.running_dtype, c), m.mean, momentum));
    put(ch.running_var, ch.running_dtype, c,
        update_running(get(ch.running_var, ch.running_dtype, c), unbiased_variance_of(m),
                       momentum));
  }
}
double count_up(const BatchNormChannels& ch) {
  if (ch.batches_tracked) ++*ch.batches_tracked;
  return ch.cumulative && ch.batches_tracked ? 1.0 / static_cast<double>(*ch.batches_tracked)
                                             : ch.momentum;
}
template <class F>
auto with(Activation a, F f) {
  switch (a) {
#define CASE(x) \
  case Activation::x: return f(std::integral_constant<Activation, Activation::x>());
    CASE(relu)
    CASE(relu6) CASE(leaky_relu) CASE(elu) CASE(sigmoid) CASE(tanh) CASE(silu) CASE(gelu)
        CASE(gelu_tanh) CASE(hardswish) CASE(hardsigmoid) CASE(mish) default
        : return f(std::integral_constant<Activation, Activation::identity>());
  }
}
template <class T>
double z_of(const ActivationShape& s, const NormalizedInput* in, const void* residual, int64_t c,
            int64_t i) {
  T z = 0;
  for (int k = 0; k < 2; ++k) {
    if (!in[k].x) continue;
    const auto st = load(in[k].stats, s, c);
    const T zk = normalize<T>(T(get(in[k].x, s.dtype, i)), T(st.mean), T(st.scale), T(st.shift));
    z = k ? z + zk : zk;
  }
  return residual ? z + T(get(residual, s.dtype, i)) : z;
}

}  // namespace

size_t batch_norm_workspace(const ActivationShape&) { return 64; }

void statistics(const StatisticsArgs& a, void*, int) {
  const ActivationShape& s = a.shape;
  const double momentum = a.moments ? 0 : count_up(a.channels);
  for (int64_t c = 0; c < s.c; ++c) {
    Moments m;
    each(s, c, [&](int64_t i, int64_t, int) { merge_moments(m, {get(a.x, s.dtype, i), 1, 0, 0}); });
    const ChannelMoments cm = channel_moments(m);
    if (a.moments) {
      put(a.moments, arith(s), c, cm.mean);
      put(a.moments, arith(s), s.c + c, cm.m2);
      put(a.moments, arith(s), 2 * s.c + c, cm.count);
    } else {
      finish(s, c, a.channels, cm, a.stats, momentum);
    }
  }
}
void combine(const CombineArgs& a) {
  const double momentum = count_up(a.channels);
  const int64_t c_ = a.shape.c;
  for (int64_t c = 0; c < c_; ++c) {
    Moments m;
    for (int64_t p = 0; p < a.processes; ++p) {
      const auto g = [&](int r) { return get(a.moments, arith(a.shape), (p * 3 + r) * c_ + c); };
      if (g(2) > 0) merge_moments(m, moments_of({g(0), g(1), g(2)}));
    }
    finish(a.shape, c, a.channels, channel_moments(m), a.stats, momentum);
  }
}
void from_running(const FromRunningArgs& a) {
  BatchNormChannels ch = a.channels;
  for (int64_t c = 0; c < a.shape.c; ++c) {
    const double mean = get(ch.running_mean, ch.running_dtype, c),
                 var = get(ch.running_var, ch.running_dtype, c);
    BatchNormChannels plain = ch;
    plain.running_mean = nullptr;
    finish(a.shape, c, plain, {mean, var, 1}, a.stats, 0);
  }
}
template <class T>
void apply_as(const ApplyArgs& a) {
  if (a.mask) __builtin_memset(a.mask, 0, static_cast<size_t>(a.shape.mask_bytes()));
  with(a.activation, [&](auto act) {
    for (int64_t c = 0; c < a.shape.c; ++c)
      each(a.shape, c, [&](int64_t i, int64_t byte, int bit) {
        const T z = static_cast<T>(z_of<T>(a.shape, a.input, a.residual, c, i));
        if constexpr (has_two_slopes(act())) {
          if (a.mask && derivative_is_upper<act()>(z))
            a.mask[byte] |= static_cast<uint8_t>(1 << bit);
        }
        put(a.y, a.shape.dtype, i, activate<act()>(z, T(a.parameter)));
      });
  });
}
void apply(const ApplyArgs& a, int) {
  a.shape.dtype == DType::f64 ? apply_as<double>(a) : apply_as<float>(a);
}

template <class T, class F>
void each_d(const BackwardArgs& a, int64_t c, F f) {
  with(a.activation, [&](auto act) {
    each(a.shape, c, [&](int64_t i, int64_t byte, int bit) {
      T d = T(get(a.dy, a.shape.dtype, i));
      if (a.dy2) d += T(get(a.dy2, a.shape.dtype, i));
      if constexpr (act() != Activation::identity) {
        if (a.mask) {
          if constexpr (has_two_slopes(act()))
            d *= a.mask[byte] >> bit & 1 ? upper_derivative<act(), T>()
                                         : lower_derivative<act()>(T(a.parameter));
        } else {
          d *= activation_derivative<act()>(T(z_of<T>(a.shape, a.input, a.residual, c, i)),
                                            T(a.parameter));
        }
      }
      f(i, d);
    });
  });
}
template <class T>
void reduce_as(const BackwardArgs& a) {
  const ActivationShape& s = a.shape;
  for (int64_t c = 0; c < s.c; ++c)
    for (int k = 0; k < 2; ++k) {
      if (!a.input[k].x) continue;
      const auto st = load(a.input[k].stats, s, c);
      double sum = 0, product = 0;
      each_d<T>(a, c, [&](int64_t i, T d) {
        sum += d;
        product += double(d) * (get(a.input[k].x, s.dtype, i) - st.mean);
      });
      const BatchNormSums sums = make_sums(sum, product, st.mean_low);
      const InputGradient& g = a.grad[k];
      if (g.grad_bias) put(g.grad_bias, g.param_dtype, c, sums.grad);
      if (g.grad_weight) put(g.grad_weight, g.param_dtype, c, sums.grad_input * st.invstd);
      if (k == 0 && a.sums) {
        put(a.sums, arith(s), c, sums.grad);
        put(a.sums, arith(s), s.c + c, sums.grad_input);
      }
      if (g.coefficients) {
        BatchNormCoefficients<double> co = {st.scale, 0, 0};
        if (a.batch_statistics && a.count > 0) co = make_coefficients<double>(sums, a.count, st);
        put(g.coefficients, arith(s), c, co.on_grad);
        put(g.coefficients, arith(s), s.c + c, co.on_input);
        put(g.coefficients, arith(s), 2 * s.c + c, co.constant);
      }
    }
}
void reduce(const BackwardArgs& a, void*, int) {
  a.shape.dtype == DType::f64 ? reduce_as<double>(a) : reduce_as<float>(a);
}
void coefficients(const CoefficientsArgs& a) {
  const DType t = arith(a.shape);
  for (int64_t c = 0; c < a.shape.c; ++c) {
    const auto co = make_coefficients<double>({get(a.sums, t, c), get(a.sums, t, a.shape.c + c)},
                                              get(a.count, t, 0), load(a.stats, a.shape, c));
    put(a.coefficients, t, c, co.on_grad);
    put(a.coefficients, t, a.shape.c + c, co.on_input);
    put(a.coefficients, t, 2 * a.shape.c + c, co.constant);
  }
}
template <class T>
void apply_grad_as(const BackwardArgs& a) {
  const ActivationShape& s = a.shape;
  for (int64_t c = 0; c < s.c; ++c)
    each_d<T>(a, c, [&](int64_t i, T d) {
      for (int k = 0; k < 2; ++k) {
        if (!a.grad[k].dx) continue;
        const T mean = T(load(a.input[k].stats, s, c).mean);
        const auto co = [&](int r) {
          return T(get(a.grad[k].coefficients, arith(s), r * s.c + c));
        };
        put(a.grad[k].dx, s.dtype, i,
            fused_multiply_add(
                d, co(0),
                fused_multiply_add(T(get(a.input[k].x, s.dtype, i)) - mean, co(1), co(2))));
      }
      if (a.grad_residual) put(a.grad_residual, s.dtype, i, d);
    });
}
void apply_grad(const BackwardArgs& a, int) {
  a.shape.dtype == DType::f64 ? apply_grad_as<double>(a) : apply_grad_as<float>(a);
}

}  // namespace braze::cpu
