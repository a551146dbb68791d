// The passes over activations of the backward. Included once per instruction set.

#include "batch_norm_channels.inl"
#include "batch_norm_gradient.inl"

namespace BRAZE_ISA {

constexpr int64_t kRows = 8;     // rows whose sums are formed in registers
constexpr int64_t kChunk = 128;  // columns of a tile of d

// ---------------------------------------------------------------------- reduce

template <class T>
struct GradientSums {
  T* grad;
  T* input[2];
};

// D is what memory holds of d: dy, or a tile. Only where both are dy's type are columns planar.
template <int kCount, int kP, bool kPlane, bool kRelu, class D, class S, class T>
BRAZE_TARGET inline void add_gradient_columns(const D* __restrict d, int64_t d_stride,
                                              const S* __restrict x, int64_t stride, int64_t n,
                                              const Constants<T>& k, T* __restrict grad,
                                              T* __restrict grad_input) {
  const T* __restrict mean = k.mean, * __restrict scale = k.scale, * __restrict shift = k.shift;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    T g[kP] = {}, i[kP] = {};
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      T value[kP], gradient[kP];
      load_elements<kP>(x + r * stride + j * kP, value);
      load_elements<kP>(d + r * d_stride + j * kP, gradient);
#pragma GCC unroll 2
      for (int p = 0; p < kP; ++p) {
        const int64_t c = kPlane ? 0 : p * kHalf + j;
        if constexpr (kRelu) {
          const T z = normalize(value[p], mean[c], scale[c], shift[c]);
          gradient[p] = activation_gradient<Activation::relu>(gradient[p], z, T(0));
        }
        add_gradient(gradient[p], value[p], mean[c], g[p], i[p]);
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < kP; ++p) {
      grad[p * kHalf + j] += g[p];
      grad_input[p * kHalf + j] += i[p];
    }
  }
}

template <int kCount, bool kPlane, bool kRelu, class D, class S, class T>
BRAZE_TARGET void add_gradient_rows(const D* d, int64_t d_stride, const S* x, int64_t stride,
                                    int64_t columns, const Constants<T>& k, T* grad,
                                    T* grad_input) {
  constexpr int kP = std::is_same_v<D, S> ? kPack<S> : 1;
  const int64_t n = columns / kP;
  add_gradient_columns<kCount, kP, kPlane, kRelu>(d, d_stride, x, stride, n, k, grad, grad_input);
  if (columns % kP != 0) {
    add_gradient_columns<kCount, 1, kPlane, kRelu>(d + n * kP, d_stride, x + n * kP, stride, 1,
                                                   k.at(kPlane ? 0 : n), grad + n, grad_input + n);
  }
}

// `count` rows from element e, where d is not direct.
template <int kCount, bool kPlane, class S, class T>
BRAZE_TARGET void add_tiles_of_rows(const BackwardArgs& a, int64_t e, int64_t stride,
                                    int64_t columns, const BackwardConstants<T>& k,
                                    const GradientSums<T>& sums) {
  alignas(64) T d[kCount * kChunk];
  for (int64_t c = 0; c < columns; c += kChunk) {
    const int64_t n = std::min(kChunk, columns - c);
    const BackwardConstants<T> at = kPlane ? k : k.at(c);
    for (int r = 0; r < kCount; ++r) {
      gradient_segment<kPlane, S>(a, e + r * stride + c, n, at, d + r * kChunk);
    }
    T unused[kChunk];
    for (int side = 0; side < 2; ++side) {
      const S* x = static_cast<const S*>(a.input[side].x);
      if (x == nullptr) continue;
      x += e + c;
      T* grad = side == 0 ? sums.grad + c : unused;
      if (side == 1) {
        for (int64_t j = 0; j < n; ++j) unused[j] = T(0);
      }
      if constexpr (std::is_same_v<S, F16>) {
        alignas(64) T tile[kCount * kChunk];
        for (int r = 0; r < kCount; ++r) widen(x + r * stride, tile + r * kChunk, n);
        add_gradient_rows<kCount, kPlane, false>(d, kChunk, tile, kChunk, n, at.input[side], grad,
                                                 sums.input[side] + c);
      } else {
        add_gradient_rows<kCount, kPlane, false>(d, kChunk, x, stride, n, at.input[side], grad,
                                                 sums.input[side] + c);
      }
    }
  }
}

template <int kCount, bool kPlane, class S, class T>
BRAZE_TARGET void add_gradients_of_rows(const BackwardArgs& a, int64_t e, int64_t stride,
                                        int64_t columns, const BackwardConstants<T>& k,
                                        const GradientSums<T>& sums) {
  if constexpr (!std::is_same_v<S, F16>) {
    if (is_direct_reduce<S>(a)) {
      const S* d = static_cast<const S*>(a.dy) + e;
      const S* x = static_cast<const S*>(a.input[0].x) + e;
      if (a.activation == Activation::relu) {
        add_gradient_rows<kCount, kPlane, true>(d, stride, x, stride, columns, k.input[0],
                                                sums.grad, sums.input[0]);
      } else {
        add_gradient_rows<kCount, kPlane, false>(d, stride, x, stride, columns, k.input[0],
                                                 sums.grad, sums.input[0]);
      }
      return;
    }
  }
  add_tiles_of_rows<kCount, kPlane, S>(a, e, stride, columns, k, sums);
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void add_gradients_of_matrix(const BackwardArgs& a, const Matrix& m,
                                          const BackwardConstants<T>& k,
                                          const GradientSums<T>& sums) {
  int64_t r = 0;
  for (; r + kRows <= m.rows; r += kRows) {
    add_gradients_of_rows<kRows, kPlane, S>(a, m.offset + r * m.stride, m.stride, m.columns, k,
                                            sums);
  }
  for (; r < m.rows + (m.tail > 0); ++r) {
    add_gradients_of_rows<1, kPlane, S>(a, m.offset + r * m.stride, m.stride,
                                        r < m.rows ? m.columns : m.tail, k, sums);
  }
}

// P: the type in whose order the columns are.
template <class P, class S>
BRAZE_TARGET void reduce_in_order(const BackwardArgs& a, const Geometry& g, int64_t begin,
                                  int64_t end, double* parts) {
  using T = Arithmetic<S>;
  const int used = a.input[1].x != nullptr ? 3 : 2;
  BackwardColumns<T> constants;
  alignas(64) T sums[3][2 * kHalf];
  alignas(64) double block[kMaxColumns];
  const bool planes = !g.shape.channels_last;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t part = u / g.columns(), column = u % g.columns();
    const int64_t first = g.first_channel(column), width = g.last_channel(column) - first;
    const BackwardConstants<T> k =
        constants.of(a, first, width, planes ? 1 : g.fold, !planes && kPack<P> > 1, false);
    double* into = parts + part * kPartRows * g.row() + first;
    for (int s = 0; s < used; ++s) {
      for (int64_t j = 0; j < width; ++j) into[s * g.row() + j] = 0;
    }
    for (int64_t b = g.first_block(part); b < g.first_block(part + 1); ++b) {
      const Matrix head = g.matrix(column, b, 0);
      const int64_t columns = std::max(head.columns, head.tail);
      for (int s = 0; s < used; ++s) clear_columns<P>(columns, sums[s]);
      const GradientSums<T> to = {sums[0], {sums[1], sums[2]}};
      for (int64_t i = 0; i < g.matrices(b); ++i) {
        const Matrix m = g.matrix(column, b, i);
        planes ? add_gradients_of_matrix<true, S>(a, m, k, to)
               : add_gradients_of_matrix<false, S>(a, m, k, to);
      }
      for (int s = 0; s < used; ++s) {
        sum_columns<P>(sums[s], planes, width, columns, block);
        for (int64_t j = 0; j < width; ++j) into[s * g.row() + j] += block[j];
      }
    }
  }
}

template <class S>
BRAZE_TARGET void reduce_of(const BackwardArgs& a, const Geometry& g, int64_t begin, int64_t end,
                            double* parts) {
  is_direct_reduce<S>(a) ? reduce_in_order<S, S>(a, g, begin, end, parts)
                         : reduce_in_order<Arithmetic<S>, S>(a, g, begin, end, parts);
}

// ------------------------------------------------------------------ apply_grad

template <int kCount, int kP, bool kPlane, bool kRelu, bool kFrozen, class D, class S, class O,
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
      if constexpr (kRelu || !kFrozen) load_elements<kP>(x + e, value);
#pragma GCC unroll 2
      for (int p = 0; p < kP; ++p) {
        const int64_t c = kPlane ? 0 : p * kHalf + j;
        if constexpr (kRelu) {
          const T z = normalize(value[p], mean[c], scale[c], shift[c]);
          gradient[p] = activation_gradient<Activation::relu>(gradient[p], z, T(0));
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

template <int kCount, bool kPlane, bool kRelu, bool kFrozen, class D, class S, class O, class T>
BRAZE_TARGET void input_gradient_rows(const D* d, const S* x, O* dx, int64_t stride,
                                      int64_t columns, const BackwardConstants<T>& k, int side) {
  constexpr int kP = std::is_same_v<D, S> ? kPack<S> : 1;
  const int64_t n = columns / kP;
  input_gradient_columns<kCount, kP, kPlane, kRelu, kFrozen>(d, x, dx, stride, n, k, side);
  if (columns % kP != 0) {
    const int64_t e = n * kP;
    input_gradient_columns<kCount, 1, kPlane, kRelu, kFrozen>(d + e, x + e, dx + e, stride, 1,
                                                              k.at(kPlane ? 0 : n), side);
  }
}

constexpr int64_t kApplyRows = 4;

template <bool kPlane, bool kRelu, bool kFrozen, class S, class T>
BRAZE_TARGET void apply_grad_directly(const BackwardArgs& a, const Matrix& m,
                                      const BackwardConstants<T>& k) {
  const S* dy = static_cast<const S*>(a.dy) + m.offset;
  const S* x = static_cast<const S*>(a.input[0].x) + m.offset;
  S* dx = static_cast<S*>(a.grad[0].dx) + m.offset;
  int64_t r = 0;
  if constexpr (!kPlane) {
    for (; r + kApplyRows <= m.rows; r += kApplyRows) {
      const int64_t e = r * m.stride;
      input_gradient_rows<kApplyRows, kPlane, kRelu, kFrozen>(dy + e, x + e, dx + e, m.stride,
                                                              m.columns, k, 0);
    }
  }
  for (; r < m.rows + (m.tail > 0); ++r) {
    const int64_t e = r * m.stride;
    input_gradient_rows<1, kPlane, kRelu, kFrozen>(dy + e, x + e, dx + e, m.stride,
                                                   r < m.rows ? m.columns : m.tail, k, 0);
  }
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_grad_segment(const BackwardArgs& a, int64_t e, int64_t n,
                                     const BackwardConstants<T>& k) {
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
      a.batch_statistics ? input_gradient_rows<1, kPlane, false, false>(d, x, out, 0, n, k, side)
                         : input_gradient_rows<1, kPlane, false, true>(d, x, out, 0, n, k, side);
      narrow(out, dx, n);
    } else {
      a.batch_statistics ? input_gradient_rows<1, kPlane, false, false>(d, x, dx, 0, n, k, side)
                         : input_gradient_rows<1, kPlane, false, true>(d, x, dx, 0, n, k, side);
    }
  }
  if (a.grad_residual != nullptr) store_segment(d, n, static_cast<S*>(a.grad_residual) + e);
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_grad_matrix(const BackwardArgs& a, const Matrix& m,
                                    const BackwardConstants<T>& k) {
  if constexpr (!std::is_same_v<S, F16>) {
    if (is_direct_apply<S>(a)) {
      if (a.activation == Activation::relu) {
        return a.batch_statistics ? apply_grad_directly<kPlane, true, false, S>(a, m, k)
                                  : apply_grad_directly<kPlane, true, true, S>(a, m, k);
      }
      return a.batch_statistics ? apply_grad_directly<kPlane, false, false, S>(a, m, k)
                                : apply_grad_directly<kPlane, false, true, S>(a, m, k);
    }
  }
  for (int64_t r = 0; r < m.rows + (m.tail > 0); ++r) {
    const int64_t columns = r < m.rows ? m.columns : m.tail;
    for (int64_t j = 0; j < columns; j += kSegment) {
      apply_grad_segment<kPlane, S>(a, m.offset + r * m.stride + j, std::min(kSegment, columns - j),
                                    k.at(kPlane ? 0 : j));
    }
  }
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
                   double* parts) {
  switch (a.shape.dtype) {
    case DType::f32: return reduce_of<float>(a, g, begin, end, parts);
    case DType::f64: return reduce_of<double>(a, g, begin, end, parts);
    case DType::bf16: return reduce_of<Bf16>(a, g, begin, end, parts);
    case DType::f16: return reduce_of<F16>(a, g, begin, end, parts);
  }
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
  switch (a.shape.dtype) {
    case DType::f32: return apply_grad_of<float>(a, tiles, begin, end);
    case DType::f64: return apply_grad_of<double>(a, tiles, begin, end);
    case DType::bf16: return apply_grad_of<Bf16>(a, tiles, begin, end);
    case DType::f16: return apply_grad_of<F16>(a, tiles, begin, end);
  }
}

}  // namespace BRAZE_ISA
