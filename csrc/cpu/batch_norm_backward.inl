// The passes over activations of the backward. Included once per instruction set.

#include "batch_norm_channels.inl"

namespace BRAZE_ISA {

constexpr int64_t kRows = 8;     // rows whose sums are formed in registers
constexpr int64_t kChunk = 128;  // columns of a tile of d

template <class T>
struct BackwardConstants {
  Constants<T> input[2];
  const T* on_grad[2] = {};
  const T* on_input[2] = {};
  const T* constant[2] = {};
  BackwardConstants at(int64_t column) const {
    BackwardConstants k = *this;
    for (int side = 0; side < 2; ++side) {
      k.input[side] = input[side].at(column);
      if (on_grad[side] == nullptr) continue;
      k.on_grad[side] += column;
      k.on_input[side] += column;
      k.constant[side] += column;
    }
    return k;
  }
};

// Whether d is dy, or a function of dy and x that the loops below know.
inline bool is_direct(const BackwardArgs& a) {
  if (a.dy2 != nullptr) return false;
  return a.activation == Activation::identity ||
         (a.activation == Activation::relu && a.mask == nullptr && a.residual == nullptr &&
          a.input[1].x == nullptr);
}

// d of elements [e, e + n).
template <bool kPlane, class S, class T>
BRAZE_TARGET void gradient_segment(const BackwardArgs& a, int64_t e, int64_t n,
                                   const BackwardConstants<T>& k, T* d) {
  load_segment(static_cast<const S*>(a.dy) + e, n, d);
  if (a.dy2 != nullptr) add_segment(static_cast<const S*>(a.dy2) + e, n, d);
  if (a.activation == Activation::identity) return;
  const ActivationSegments<T>& segments = segments_of<T>(a.activation);
  const T parameter = static_cast<T>(a.parameter);
  if (a.mask != nullptr) {
    masked_segment(a.mask, a.shape.row(), e, n, segments.upper(), segments.lower(parameter), d);
    return;
  }
  T z[kSegment];
  normalize_segment<kPlane, false>(static_cast<const S*>(a.input[0].x) + e, k.input[0], n, z);
  if (a.input[1].x != nullptr) {
    normalize_segment<kPlane, true>(static_cast<const S*>(a.input[1].x) + e, k.input[1], n, z);
  }
  if (a.residual != nullptr) add_segment(static_cast<const S*>(a.residual) + e, n, z);
  segments.differentiate(z, d, n, parameter);
}

// ---------------------------------------------------------------------- reduce

template <class T>
struct GradientSums {
  T* grad;
  T* input[2];
};

// D is what memory holds of d: dy, or a tile.
template <int kCount, bool kPlane, bool kRelu, class D, class S, class T>
BRAZE_TARGET void add_gradient_rows(const D* __restrict d, int64_t d_stride, const S* __restrict x,
                                    int64_t stride, int64_t columns, const Constants<T>& k,
                                    T* __restrict grad, T* __restrict grad_input) {
  const T* __restrict mean = k.mean, * __restrict scale = k.scale, * __restrict shift = k.shift;
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t c = kPlane ? 0 : j;
    const T m = mean[c];
    T g = T(0), i = T(0);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const T value = T(from_storage(x[r * stride + j]));
      T gradient = T(from_storage(d[r * d_stride + j]));
      if constexpr (kRelu) {
        gradient = activation_gradient<Activation::relu>(
            gradient, normalize(value, m, scale[c], shift[c]), T(0));
      }
      add_gradient(gradient, value, m, g, i);
    }
    grad[j] += g;
    grad_input[j] += i;
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
    if (is_direct(a) && a.input[1].x == nullptr) {
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

// `pixels` copies side by side of the constants of channels [begin, begin + width).
template <class T>
struct RepeatedBackwardConstants {
  BRAZE_TARGET const T* repeat(int row, const T* in, int64_t width, int64_t pixels) {
    if (pixels == 1) return in;
    T* out = rows[row];
    for (int64_t j = 0; j < width; ++j) out[j] = in[j];
    for (int64_t j = width; j < pixels * width; ++j) out[j] = out[j - width];
    return out;
  }
  // coefficients: reduce has written them.
  BRAZE_TARGET BackwardConstants<T> of(const BackwardArgs& a, int64_t begin, int64_t width,
                                       int64_t pixels, bool coefficients) {
    const int64_t c = a.shape.c;
    BackwardConstants<T> k;
    for (int side = 0; side < 2; ++side) {
      const T* s = static_cast<const T*>(a.input[side].stats);
      if (s == nullptr) continue;
      s += begin;
      k.input[side] = {repeat(6 * side, s + kMean * c, width, pixels),
                       repeat(6 * side + 1, s + kScale * c, width, pixels),
                       repeat(6 * side + 2, s + kShift * c, width, pixels)};
      const T* f = static_cast<const T*>(a.grad[side].coefficients);
      if (f == nullptr || !coefficients) continue;
      f += begin;
      k.on_grad[side] = repeat(6 * side + 3, f + kOnGrad * c, width, pixels);
      k.on_input[side] = repeat(6 * side + 4, f + kOnInput * c, width, pixels);
      k.constant[side] = repeat(6 * side + 5, f + kConstant * c, width, pixels);
    }
    return k;
  }
  alignas(64) T rows[12][kMaxColumns];
};

template <class S>
BRAZE_TARGET void reduce_of(const BackwardArgs& a, const Geometry& g, int64_t begin, int64_t end,
                            double* parts) {
  using T = Arithmetic<S>;
  constexpr int kSums = 3;
  const int used = a.input[1].x != nullptr ? 3 : 2;
  RepeatedBackwardConstants<T> repeated;
  alignas(64) T sums[kSums][kMaxColumns];
  alignas(64) double block[kMaxColumns];
  for (int64_t u = begin; u < end; ++u) {
    const int64_t part = u / g.columns(), column = u % g.columns();
    const int64_t first = g.first_channel(column), width = g.last_channel(column) - first;
    const BackwardConstants<T> k =
        repeated.of(a, first, width, g.shape.channels_last ? g.fold : 1, false);
    double* into = parts + part * kPartRows * g.row() + first;
    for (int s = 0; s < used; ++s) {
      for (int64_t j = 0; j < width; ++j) into[s * g.row() + j] = 0;
    }
    for (int64_t b = g.first_block(part); b < g.first_block(part + 1); ++b) {
      const Matrix head = g.matrix(column, b, 0);
      const int64_t columns = std::max(head.columns, head.tail);
      for (int s = 0; s < used; ++s) {
        for (int64_t j = 0; j < columns; ++j) sums[s][j] = T(0);
      }
      for (int64_t i = 0; i < g.matrices(b); ++i) {
        const Matrix m = g.matrix(column, b, i);
        const GradientSums<T> to = {sums[0], {sums[1], sums[2]}};
        if (g.shape.channels_last) {
          add_gradients_of_matrix<false, S>(a, m, k, to);
        } else {
          add_gradients_of_matrix<true, S>(a, m, k, to);
        }
      }
      for (int s = 0; s < used; ++s) {
        if (g.shape.channels_last) {
          sum_of_pixels(sums[s], width, columns, block);
        } else {
          block[0] = sum_of_columns(sums[s], columns);
        }
        for (int64_t j = 0; j < width; ++j) into[s * g.row() + j] += block[j];
      }
    }
  }
}

// ------------------------------------------------------------------ apply_grad

template <int kCount, bool kPlane, bool kRelu, bool kFrozen, class D, class S, class T>
BRAZE_TARGET void input_gradient_rows(const D* d, const S* x, S* dx, int64_t stride,
                                      int64_t columns, const BackwardConstants<T>& k, int side) {
  const T *mean = k.input[side].mean, *scale = k.input[side].scale, *shift = k.input[side].shift;
  const T *on_grad = k.on_grad[side], *on_input = k.on_input[side], *constant = k.constant[side];
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t c = kPlane ? 0 : j;
    const T m = mean[c], f = on_grad[c];
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const int64_t e = r * stride + j;
      T gradient = T(from_storage(d[e]));
      if constexpr (kFrozen && !kRelu) {
        to_storage(input_gradient(gradient, f), dx[e]);
      } else {
        const T value = T(from_storage(x[e]));
        if constexpr (kRelu) {
          gradient = activation_gradient<Activation::relu>(
              gradient, normalize(value, m, scale[c], shift[c]), T(0));
        }
        to_storage(kFrozen ? input_gradient(gradient, f)
                           : input_gradient(gradient, value, m, f, on_input[c], constant[c]),
                   dx[e]);
      }
    }
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
    if (is_direct(a) && a.grad[0].dx != nullptr && a.grad[1].dx == nullptr &&
        a.grad_residual == nullptr) {
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
  RepeatedBackwardConstants<Arithmetic<S>> repeated;
  const BackwardConstants<Arithmetic<S>> k = repeated.of(a, 0, a.shape.c, tiles.fold, true);
  while (end > begin) {
    Matrix m = tiles.matrix(--end);
    if (a.shape.channels_last) {
      apply_grad_matrix<false, S>(a, m, k);
      continue;
    }
    const int64_t channel = tiles.first_channel(end), planes = m.rows;
    m.rows = 1;
    for (int64_t i = 0; i < planes; ++i, m.offset += m.stride) {
      apply_grad_matrix<true, S>(a, m, k.at(channel + i));
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
