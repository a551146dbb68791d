// The passes over activations of the backward. Included once per instruction set.

#include "batch_norm_reduce.inl"

namespace BRAZE_ISA {

// ------------------------------------------------------------------ apply_grad

template <int kCount, int kP, bool kPlane, Activation kA, bool kFrozen, class D, class S, class O,
          class T>
BRAZE_TARGET inline void input_gradient_columns(const D* d, const S* x, O* dx, int64_t stride,
                                                int64_t n, const BackwardConstants<T>& k,
                                                int side) {
  const T *mean = k.input[side].mean, *scale = k.input[side].scale, *shift = k.input[side].shift;
  const T *on_grad = k.on_grad[side], *on_input = k.on_input[side], *constant = k.constant[side];
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const int64_t e = r * stride + j * kP;
      T gradient[kP], value[kP] = {}, out[kP];
      load_elements<kP>(d + e, gradient);
      if constexpr (kNeedsZ<kA> || !kFrozen) load_elements<kP>(x + e, value);
#pragma GCC unroll 2
      for (int p = 0; p < kP; ++p) {
        const int64_t c = kPlane ? 0 : p * kHalf + j;
        if constexpr (kNeedsZ<kA>) {
          const T z = normalize(value[p], mean[c], scale[c], shift[c]);
          gradient[p] = activation_gradient<kA>(gradient[p], z, T(0));
        }
        if constexpr (kFrozen) {
          out[p] = input_gradient(gradient[p], on_grad[c]);
        } else {
          out[p] =
              input_gradient(gradient[p], value[p], mean[c], on_grad[c], on_input[c], constant[c]);
        }
      }
      store_elements<kP>(out, dx + e);
    }
  }
}

template <int kCount, bool kPlane, Activation kA, bool kFrozen, class D, class S, class O, class T>
BRAZE_TARGET void input_gradient_rows(const D* d, const S* x, O* dx, int64_t stride,
                                      int64_t columns, const BackwardConstants<T>& k, int side) {
  constexpr int kP = std::is_same_v<D, S> ? kPack<S> : 1;
  const int64_t n = columns / kP;
  input_gradient_columns<kCount, kP, kPlane, kA, kFrozen>(d, x, dx, stride, n, k, side);
  if (columns % kP != 0) {
    const int64_t e = n * kP;
    input_gradient_columns<kCount, 1, kPlane, kA, kFrozen>(d + e, x + e, dx + e, stride, 1,
                                                           k.at(kPlane ? 0 : n), side);
  }
}

constexpr int kGradientStreams = 2;  // rows at once

template <bool kPlane, Activation kA, bool kFrozen, class S, class T>
BRAZE_TARGET void apply_grad_directly(const BackwardArgs& a, const Matrix& m,
                                      const BackwardConstants<T>& k) {
  const S* dy = static_cast<const S*>(a.dy);
  const S* x = static_cast<const S*>(a.input[0].x);
  S* dx = static_cast<S*>(a.grad[0].dx);
  rows_at_once<kPlane ? 1 : kGradientStreams>(
      m, [&]<int kCount>(int64_t e, int64_t stride, int64_t n) {
        input_gradient_rows<kCount, kPlane, kA, kFrozen>(dy + e, x + e, dx + e, stride, n, k, 0);
      });
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_grad_direct_matrix(const BackwardArgs& a, const Matrix& m,
                                           const BackwardConstants<T>& k) {
  with_direct_activation(a.activation, [&]<Activation kA>() {
    a.batch_statistics ? apply_grad_directly<kPlane, kA, false, S>(a, m, k)
                       : apply_grad_directly<kPlane, kA, true, S>(a, m, k);
  });
}

template <int kCount, bool kPlane, class S>
BRAZE_TARGET void apply_grad_blocks(const BackwardArgs& a, int64_t e, int64_t stride, int64_t n,
                                    const BackwardConstants<float>& k) {
  with_direct_activation(a.activation, [&]<Activation kA>() {
    a.batch_statistics ? input_gradient_blocks<kCount, kPlane, kA, false, S>(a, e, stride, n, k)
                       : input_gradient_blocks<kCount, kPlane, kA, true, S>(a, e, stride, n, k);
  });
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_grad_segment(const BackwardArgs& a, int64_t e, int64_t n,
                                     const BackwardConstants<T>& k) {
  constexpr Activation kLinear = Activation::identity;
  T d[kSegment];
  gradient_segment<kPlane, S>(a, e, n, k, d);
  T buffer[2][kSegment];
  // Everything is read before anything is written: dx may be dy.
  const auto* x0 = readable(static_cast<const S*>(a.input[0].x) + e, n, buffer[0]);
  const bool both = a.input[1].x != nullptr && a.grad[1].dx != nullptr;
  const auto* x1 = both ? readable(static_cast<const S*>(a.input[1].x) + e, n, buffer[1]) : x0;
  for (int side = 0; side < 2; ++side) {
    if (a.grad[side].dx == nullptr || (side == 1 && !both)) continue;
    const auto* x = side == 0 ? x0 : x1;
    S* dx = static_cast<S*>(a.grad[side].dx) + e;
    if constexpr (std::is_same_v<S, F16>) {
      T out[kSegment];
      a.batch_statistics ? input_gradient_rows<1, kPlane, kLinear, false>(d, x, out, 0, n, k, side)
                         : input_gradient_rows<1, kPlane, kLinear, true>(d, x, out, 0, n, k, side);
      narrow(out, dx, n);
    } else {
      a.batch_statistics ? input_gradient_rows<1, kPlane, kLinear, false>(d, x, dx, 0, n, k, side)
                         : input_gradient_rows<1, kPlane, kLinear, true>(d, x, dx, 0, n, k, side);
    }
  }
  if (a.grad_residual != nullptr) store_segment(d, n, static_cast<S*>(a.grad_residual) + e);
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_grad_matrix(const BackwardArgs& a, const Matrix& m,
                                    const BackwardConstants<T>& k) {
  if constexpr (!std::is_same_v<S, F16>) {
    if (is_direct_apply<S>(a)) return apply_grad_direct_matrix<kPlane, S>(a, m, k);
  }
  rows_at_once<kPlane ? 1 : kGradientStreams>(m, [&]<int kCount>(int64_t e, int64_t stride,
                                                                 int64_t n) {
    int64_t done = 0;
    if constexpr (std::is_same_v<T, float>) {
      if (is_blocked_apply(a)) {
        done = n / kBlock * kBlock;
        apply_grad_blocks<kCount, kPlane, S>(a, e, stride, done, k);
      }
    }
    for (int r = 0; r < kCount; ++r, e += stride) {
      for (int64_t j = done; j < n; j += kSegment) {
        apply_grad_segment<kPlane, S>(a, e + j, std::min(kSegment, n - j), k.at(kPlane ? 0 : j));
      }
    }
  });
}

template <class S>
BRAZE_TARGET void apply_grad_of(const BackwardArgs& a, const Tiles& tiles, int64_t begin,
                                int64_t end) {
  const int64_t c = a.shape.c;
  BackwardColumns<Arithmetic<S>> columns;
  if (!a.shape.channels_last) {
    const BackwardConstants<Arithmetic<S>> k = columns.of(a, 0, c, 1, false, true);
    while (end > begin) {
      Matrix m = tiles.matrix(--end);
      const int64_t channel = tiles.first_channel(end), planes = m.rows;
      m.rows = 1;
      for (int64_t i = 0; i < planes; ++i, m.offset += m.stride) {
        apply_grad_matrix<true, S>(a, m, k.at(channel + i));
      }
    }
    return;
  }
  const bool planar = kPack<S> > 1 && is_direct_apply<S>(a);
  const int64_t slab = planar ? std::min(c, 2 * kHalf) : c;
  for (int64_t first = 0; first < c; first += slab) {
    const int64_t width = std::min(slab, c - first);
    const BackwardConstants<Arithmetic<S>> k =
        columns.of(a, first, width, tiles.fold, planar, true);
    for (int64_t tile = end; tile > begin;) {
      Matrix m = tiles.matrix(--tile);
      m.offset += first;
      m.columns = tiles.fold * width;
      apply_grad_matrix<false, S>(a, m, k);
    }
  }
}

// What batch_norm_backward_cpu.cpp calls, for every type.

inline void reduce(const BackwardArgs& a, const Geometry& g, int64_t begin, int64_t end,
                   double* parts, void* kept) {
  with_dtype(a.shape.dtype,
             [&](auto element) { reduce_of<decltype(element)>(a, g, begin, end, parts, kept); });
}

inline void finish_reduce(const BackwardArgs& a, const Geometry& g, const double* parts,
                          int64_t begin, int64_t end) {
  a.shape.dtype == DType::f64 ? finish_reduce_of<double>(a, g, parts, begin, end)
                              : finish_reduce_of<float>(a, g, parts, begin, end);
}

inline void coefficients(const CoefficientsArgs& a) {
  a.shape.dtype == DType::f64 ? coefficients_of<double>(a) : coefficients_of<float>(a);
}

inline void apply_grad(const BackwardArgs& a, const Tiles& tiles, int64_t begin, int64_t end) {
  with_dtype(a.shape.dtype,
             [&](auto element) { apply_grad_of<decltype(element)>(a, tiles, begin, end); });
}

}  // namespace BRAZE_ISA
