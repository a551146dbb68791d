// The passes over activations of the forward. Included once per instruction set.

#include "batch_norm_channels.inl"

namespace BRAZE_ISA {

constexpr int64_t kRows = 8;     // rows whose sums are formed in registers
constexpr int64_t kChunk = 128;  // columns of a converted tile

// ------------------------------------------------------------------ statistics

// The columns [begin, end), kP at a time.
template <int kCount, int kP, class S, class T>
BRAZE_TARGET inline void add_moment_columns(const S* __restrict x, int64_t stride, int64_t begin,
                                            int64_t end, const T* __restrict shift,
                                            T* __restrict sum, T* __restrict square) {
#pragma omp simd
  for (int64_t j = begin / kP; j < end / kP; ++j) {
    T s[kP] = {}, q[kP] = {};
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      T v[kP];
      load_elements<kP>(x + r * stride + j * kP, v);
#pragma GCC unroll 2
      for (int p = 0; p < kP; ++p) add_moment(v[p], shift[j * kP + p], s[p], q[p]);
    }
#pragma GCC unroll 2
    for (int p = 0; p < kP; ++p) {
      sum[j * kP + p] += s[p];
      square[j * kP + p] += q[p];
    }
  }
}

template <int kCount, class S, class T>
BRAZE_TARGET void add_moment_rows(const S* x, int64_t stride, int64_t columns, const T* shift,
                                  T* sum, T* square) {
  constexpr int kP = kPack<S>;
  const int64_t whole = columns / kP * kP;
  add_moment_columns<kCount, kP>(x, stride, 0, whole, shift, sum, square);
  if constexpr (kP > 1) {
    add_moment_columns<kCount, 1>(x, stride, whole, columns, shift, sum, square);
  }
}

template <int kCount, class S, class T>
BRAZE_TARGET void add_moments_of_rows(const S* x, int64_t stride, int64_t columns, const T* shift,
                                      T* sum, T* square) {
  if constexpr (std::is_same_v<S, F16>) {
    alignas(64) T tile[kCount * kChunk];
    for (int64_t c = 0; c < columns; c += kChunk) {
      const int64_t n = std::min(kChunk, columns - c);
      for (int r = 0; r < kCount; ++r) widen(x + r * stride + c, tile + r * kChunk, n);
      add_moment_rows<kCount>(tile, kChunk, n, shift + c, sum + c, square + c);
    }
  } else {
    add_moment_rows<kCount>(x, stride, columns, shift, sum, square);
  }
}

template <class S, class T>
BRAZE_TARGET void add_moments_of_matrix(const S* x, const Matrix& m, const T* shift, T* sum,
                                        T* square) {
  x += m.offset;
  int64_t r = 0;
  for (; r + kRows <= m.rows; r += kRows) {
    add_moments_of_rows<kRows>(x + r * m.stride, m.stride, m.columns, shift, sum, square);
  }
  for (; r < m.rows; ++r) {
    add_moments_of_rows<1>(x + r * m.stride, m.stride, m.columns, shift, sum, square);
  }
  if (m.tail > 0) add_moments_of_rows<1>(x + r * m.stride, m.stride, m.tail, shift, sum, square);
}

// Numbers near the means of `width` channels, repeated in all columns.
template <class S, class T>
BRAZE_TARGET void shifts_of_channels(const S* x, int64_t c, int64_t width, int64_t pixels,
                                     int64_t columns, T* shift) {
  pixels = std::min<int64_t>(pixels, 8);
  T pixel[kSegment];
  for (int64_t j = 0; j < width; ++j) shift[j] = T(0);
  for (int64_t p = 0; p < pixels; ++p) {
    load_segment(x + p * c, width, pixel);
    for (int64_t j = 0; j < width; ++j) shift[j] += pixel[j];
  }
  for (int64_t j = 0; j < width; ++j) shift[j] = make_shift(shift[j], static_cast<T>(pixels));
  for (int64_t j = width; j < columns; ++j) shift[j] = shift[j - width];
}

template <class S, class T>
BRAZE_TARGET void shift_of_plane(const S* x, int64_t spatial, int64_t columns, T* shift) {
  const int64_t n = std::min<int64_t>(spatial, 16);
  T values[16];
  load_segment(x, n, values);
  T sum = T(0);
  for (int64_t j = 0; j < n; ++j) sum += values[j];
  const T value = make_shift(sum, static_cast<T>(n));
  for (int64_t j = 0; j < columns; ++j) shift[j] = value;
}

template <class S>
BRAZE_TARGET void statistics_of(const StatisticsArgs& a, const Geometry& g, int64_t begin,
                                int64_t end, double* parts) {
  using T = Arithmetic<S>;
  const S* x = static_cast<const S*>(a.x);
  alignas(64) T shift[kMaxColumns], sum[kMaxColumns], square[kMaxColumns];
  alignas(64) double sums[kMaxColumns], squares[kMaxColumns];
  for (int64_t u = begin; u < end; ++u) {
    const int64_t part = u / g.columns(), column = u % g.columns();
    const int64_t first = g.first_channel(column), width = g.last_channel(column) - first;
    double* into = parts + part * kPartRows * g.row() + first;
    double count = 0;
    for (int64_t b = g.first_block(part); b < g.first_block(part + 1); ++b) {
      double block_count = 0;
      for (int64_t i = 0; i < g.matrices(b); ++i) {
        const Matrix m = g.matrix(column, b, i);
        const int64_t columns = std::max(m.columns, m.tail);
        if (i == 0) {
          if (g.shape.channels_last) {
            const int64_t pixels = m.rows * g.fold + m.tail / width;
            shifts_of_channels(x + m.offset, g.shape.c, width, pixels, columns, shift);
          } else {
            shift_of_plane(x + m.offset, m.rows > 0 ? m.columns : m.tail, columns, shift);
          }
          for (int64_t j = 0; j < columns; ++j) sum[j] = square[j] = T(0);
        }
        add_moments_of_matrix(x, m, shift, sum, square);
        block_count +=
            static_cast<double>(m.rows * m.columns + m.tail) / static_cast<double>(width);
      }
      const Matrix m = g.matrix(column, b, 0);
      const int64_t columns = std::max(m.columns, m.tail);
      if (g.shape.channels_last) {
        sum_of_pixels(sum, width, columns, sums);
        sum_of_pixels(square, width, columns, squares);
      } else {
        sums[0] = sum_of_columns(sum, columns);
        squares[0] = sum_of_columns(square, columns);
      }
      for (int64_t j = 0; j < width; ++j) {
        Moments total = {into[j], count, into[g.row() + j], into[2 * g.row() + j]};
        merge_moments(total, {static_cast<double>(shift[j]), block_count, sums[j], squares[j]});
        into[j] = total.shift;
        into[g.row() + j] = total.sum;
        into[2 * g.row() + j] = total.square;
      }
      count += block_count;
    }
  }
}

// ----------------------------------------------------------------------- apply

template <int kCount, int kP, bool kPlane, Activation kA, bool kResidual, class S, class T>
BRAZE_TARGET inline void apply_columns(const S* x, const S* residual, S* y, int64_t stride,
                                       int64_t begin, int64_t end, const Constants<T>& k) {
  const T *mean = k.mean, *scale = k.scale, *shift = k.shift;
#pragma omp simd
  for (int64_t j = begin / kP; j < end / kP; ++j) {
    T m[kP], a[kP], b[kP];
#pragma GCC unroll 2
    for (int p = 0; p < kP; ++p) {
      const int64_t c = kPlane ? 0 : j * kP + p;
      m[p] = mean[c];
      a[p] = scale[c];
      b[p] = shift[c];
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const int64_t e = r * stride + j * kP;
      T z[kP], added[kP] = {};
      load_elements<kP>(x + e, z);
      if constexpr (kResidual) load_elements<kP>(residual + e, added);
#pragma GCC unroll 2
      for (int p = 0; p < kP; ++p) {
        z[p] = normalize(z[p], m[p], a[p], b[p]);
        if constexpr (kResidual) z[p] += added[p];
        z[p] = activate<kA>(z[p], T(0));
      }
      store_elements<kP>(z, y + e);
    }
  }
}

template <int kCount, bool kPlane, Activation kA, bool kResidual, class S, class T>
BRAZE_TARGET void apply_rows(const S* x, const S* residual, S* y, int64_t stride, int64_t columns,
                             const Constants<T>& k) {
  constexpr int kP = kPack<S>;
  const int64_t whole = columns / kP * kP;
  apply_columns<kCount, kP, kPlane, kA, kResidual>(x, residual, y, stride, 0, whole, k);
  if constexpr (kP > 1) {
    apply_columns<kCount, 1, kPlane, kA, kResidual>(x, residual, y, stride, whole, columns, k);
  }
}

constexpr int64_t kApplyRows = 4;

template <bool kPlane, Activation kA, bool kResidual, class S, class T>
BRAZE_TARGET void apply_directly(const ApplyArgs& a, const Matrix& m, const Constants<T>& k) {
  const S* x = static_cast<const S*>(a.input[0].x) + m.offset;
  const S* residual = kResidual ? static_cast<const S*>(a.residual) + m.offset : nullptr;
  S* y = static_cast<S*>(a.y) + m.offset;
  int64_t r = 0;
  if constexpr (!kPlane) {
    for (; r + kApplyRows <= m.rows; r += kApplyRows) {
      const int64_t e = r * m.stride;
      apply_rows<kApplyRows, kPlane, kA, kResidual>(x + e, kResidual ? residual + e : nullptr,
                                                    y + e, m.stride, m.columns, k);
    }
  }
  for (; r < m.rows + (m.tail > 0); ++r) {
    const int64_t e = r * m.stride;
    apply_rows<1, kPlane, kA, kResidual>(x + e, kResidual ? residual + e : nullptr, y + e, m.stride,
                                         r < m.rows ? m.columns : m.tail, k);
  }
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_segment(const ApplyArgs& a, int64_t e, int64_t n, const Constants<T>& k,
                                const Constants<T>& k2) {
  T z[kSegment];
  normalize_segment<kPlane, false>(static_cast<const S*>(a.input[0].x) + e, k, n, z);
  if (a.input[1].x != nullptr) {
    normalize_segment<kPlane, true>(static_cast<const S*>(a.input[1].x) + e, k2, n, z);
  }
  if (a.residual != nullptr) add_segment(static_cast<const S*>(a.residual) + e, n, z);
  const ActivationSegments<T>& segments = segments_of<T>(a.activation);
  if (a.mask != nullptr) {
    const int64_t row = a.shape.row();
    const int64_t begin = e / row * ((row + kByte - 1) / kByte) + e % row / kByte;
    segments.mask(z, n, a.mask + begin);
  }
  if (a.activation != Activation::identity) segments.activate(z, n, static_cast<T>(a.parameter));
  store_segment(z, n, static_cast<S*>(a.y) + e);
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_matrix(const ApplyArgs& a, const Matrix& m, const Constants<T>& k,
                               const Constants<T>& k2) {
  const bool simple = a.activation == Activation::identity || a.activation == Activation::relu;
  if constexpr (!std::is_same_v<S, F16>) {
    if (simple && a.input[1].x == nullptr && a.mask == nullptr) {
      const bool relu = a.activation == Activation::relu, residual = a.residual != nullptr;
      if (relu && residual) return apply_directly<kPlane, Activation::relu, true, S>(a, m, k);
      if (relu) return apply_directly<kPlane, Activation::relu, false, S>(a, m, k);
      if (residual) return apply_directly<kPlane, Activation::identity, true, S>(a, m, k);
      return apply_directly<kPlane, Activation::identity, false, S>(a, m, k);
    }
  }
  for (int64_t r = 0; r < m.rows + (m.tail > 0); ++r) {
    const int64_t columns = r < m.rows ? m.columns : m.tail;
    for (int64_t j = 0; j < columns; j += kSegment) {
      const int64_t at = kPlane ? 0 : j;
      apply_segment<kPlane, S>(a, m.offset + r * m.stride + j, std::min(kSegment, columns - j),
                               k.at(at), k2.at(at));
    }
  }
}

template <class T>
struct RepeatedConstants {
  // `pixels` copies side by side of the constants of all channels, or those themselves if it is 1.
  BRAZE_TARGET Constants<T> of(const void* stats, int64_t c, int64_t pixels) {
    const T* s = static_cast<const T*>(stats);
    if (s == nullptr) return {};
    if (pixels == 1) return {s + kMean * c, s + kScale * c, s + kShift * c};
    for (int64_t j = 0; j < c; ++j) {
      mean[j] = s[kMean * c + j];
      scale[j] = s[kScale * c + j];
      shift[j] = s[kShift * c + j];
    }
    for (int64_t j = c; j < pixels * c; ++j) {
      mean[j] = mean[j - c];
      scale[j] = scale[j - c];
      shift[j] = shift[j - c];
    }
    return {mean, scale, shift};
  }
  T mean[kMaxColumns], scale[kMaxColumns], shift[kMaxColumns];
};

template <class S>
BRAZE_TARGET void apply_of(const ApplyArgs& a, const Tiles& tiles, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const int64_t c = a.shape.c;
  RepeatedConstants<T> repeated[2];
  if (a.shape.channels_last) {
    const Constants<T> k = repeated[0].of(a.input[0].stats, c, tiles.fold);
    const Constants<T> k2 = repeated[1].of(a.input[1].stats, c, tiles.fold);
    while (end > begin) apply_matrix<false, S>(a, tiles.matrix(--end), k, k2);
    return;
  }
  const Constants<T> k = repeated[0].of(a.input[0].stats, c, 1);
  const Constants<T> k2 = repeated[1].of(a.input[1].stats, c, 1);
  while (end > begin) {
    Matrix m = tiles.matrix(--end);
    const int64_t channel = tiles.first_channel(end);
    const int64_t planes = m.rows;
    m.rows = 1;
    for (int64_t i = 0; i < planes; ++i, m.offset += m.stride) {
      apply_matrix<true, S>(a, m, k.at(channel + i), k2.at(channel + i));
    }
  }
}

// What batch_norm_forward_cpu.cpp calls, for every type.

inline void statistics(const StatisticsArgs& a, const Geometry& g, int64_t begin, int64_t end,
                       double* parts) {
  switch (a.shape.dtype) {
    case DType::f32: return statistics_of<float>(a, g, begin, end, parts);
    case DType::f64: return statistics_of<double>(a, g, begin, end, parts);
    case DType::bf16: return statistics_of<Bf16>(a, g, begin, end, parts);
    case DType::f16: return statistics_of<F16>(a, g, begin, end, parts);
  }
}

inline void finish_statistics(const StatisticsArgs& a, const Geometry& g, const double* parts,
                              int64_t begin, int64_t end) {
  a.shape.dtype == DType::f64 ? finish_statistics_of<double>(a, g, parts, begin, end)
                              : finish_statistics_of<float>(a, g, parts, begin, end);
}

inline void combine(const CombineArgs& a) {
  a.shape.dtype == DType::f64 ? combine_of<double>(a) : combine_of<float>(a);
}

inline void from_running(const FromRunningArgs& a) {
  a.shape.dtype == DType::f64 ? from_running_of<double>(a) : from_running_of<float>(a);
}

inline void apply(const ApplyArgs& a, const Tiles& tiles, int64_t begin, int64_t end) {
  switch (a.shape.dtype) {
    case DType::f32: return apply_of<float>(a, tiles, begin, end);
    case DType::f64: return apply_of<double>(a, tiles, begin, end);
    case DType::bf16: return apply_of<Bf16>(a, tiles, begin, end);
    case DType::f16: return apply_of<F16>(a, tiles, begin, end);
  }
}

}  // namespace BRAZE_ISA
