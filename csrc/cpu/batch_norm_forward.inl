// The passes over activations of the forward. Included once per instruction set.

#include "batch_norm_statistics.inl"

namespace BRAZE_ISA {

// ----------------------------------------------------------------------- apply

template <int kP, bool kPlane, Activation kA, bool kResidual, class S, class T>
BRAZE_TARGET inline void apply_elements(const S* x, const S* residual, S* y, int64_t j,
                                        const T* mean, const T* scale, const T* shift) {
  T value[kP], added[kP] = {};
  load_elements<kP>(x, value);
  if constexpr (kResidual) load_elements<kP>(residual, added);
#pragma GCC unroll 2
  for (int p = 0; p < kP; ++p) {
    const int64_t c = kPlane ? 0 : p * kHalf + j;
    value[p] = normalize(value[p], mean[c], scale[c], shift[c]);
    if constexpr (kResidual) value[p] += added[p];
  }
  if constexpr (kP == 1) {  // gcc does not vectorise the select of relu through an array of one
    to_storage(activate<kA>(value[0], T(0)), *y);
  } else {
    T out[kP];
#pragma GCC unroll 2
    for (int p = 0; p < kP; ++p) out[p] = activate<kA>(value[p], T(0));
    store_elements<kP>(out, y);
  }
}

template <int kCount, int kP, bool kPlane, Activation kA, bool kResidual, class S, class T>
BRAZE_TARGET inline void apply_columns(const S* x, const S* residual, S* y, int64_t stride,
                                       int64_t n, const Constants<T>& k) {
  const T *mean = k.mean, *scale = k.scale, *shift = k.shift;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const int64_t e = r * stride + j * kP;
      apply_elements<kP, kPlane, kA, kResidual>(x + e, kResidual ? residual + e : residual, y + e,
                                                j, mean, scale, shift);
    }
  }
}

template <int kCount, bool kPlane, Activation kA, bool kResidual, class S, class T>
BRAZE_TARGET void apply_rows(const S* x, const S* residual, S* y, int64_t stride, int64_t columns,
                             const Constants<T>& k) {
  constexpr int kP = kPack<S>;
  const int64_t n = columns / kP;
  apply_columns<kCount, kP, kPlane, kA, kResidual>(x, residual, y, stride, n, k);
  if (columns % kP != 0) {
    apply_columns<kCount, 1, kPlane, kA, kResidual>(x + n * kP, kResidual ? residual + n * kP : x,
                                                    y + n * kP, stride, 1, k.at(kPlane ? 0 : n));
  }
}

// Rows at a time, so that constants stay in registers. They are far apart: the hardware prefetches
// long streams, not many short ones.
constexpr int kStreams = 4;

template <bool kPlane, Activation kA, bool kResidual, class S, class T>
BRAZE_TARGET void apply_directly(const ApplyArgs& a, const Matrix& m, const Constants<T>& k) {
  const S* x = static_cast<const S*>(a.input[0].x) + m.offset;
  const S* residual = kResidual ? static_cast<const S*>(a.residual) + m.offset : nullptr;
  S* y = static_cast<S*>(a.y) + m.offset;
  int64_t r = 0;
  if constexpr (!kPlane) {
    const int64_t quarter = m.rows / kStreams;
    for (; r < quarter; ++r) {
      const int64_t e = r * m.stride;
      apply_rows<kStreams, kPlane, kA, kResidual>(x + e, kResidual ? residual + e : nullptr, y + e,
                                                  quarter * m.stride, m.columns, k);
    }
    r *= kStreams;
  }
  for (; r < m.rows + (m.tail > 0); ++r) {
    const int64_t e = r * m.stride;
    apply_rows<1, kPlane, kA, kResidual>(x + e, kResidual ? residual + e : nullptr, y + e, m.stride,
                                         r < m.rows ? m.columns : m.tail, k);
  }
}

// Whether apply_rows can do it.
template <class S>
bool is_direct(const ApplyArgs& a) {
  return is_direct_activation(a.activation) && a.input[1].x == nullptr && a.mask == nullptr &&
         !std::is_same_v<S, F16>;
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_direct_matrix(const ApplyArgs& a, const Matrix& m, const Constants<T>& k) {
  with_direct_activation(a.activation, [&]<Activation kA>() {
    a.residual != nullptr ? apply_directly<kPlane, kA, true, S>(a, m, k)
                          : apply_directly<kPlane, kA, false, S>(a, m, k);
  });
}

inline bool is_masked_relu(const ApplyArgs& a) {
  return a.mask != nullptr && a.activation == Activation::relu && a.residual != nullptr &&
         a.input[1].x == nullptr;
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_segment(const ApplyArgs& a, int64_t e, int64_t n, const Constants<T>& k,
                                const Constants<T>& k2) {
  T z[kSegment];
  normalize_inputs<kPlane, S>(a.input, a.residual, e, n, k, k2, z);
  const ActivationSegments<T>& segments = segments_of<T>(a.activation);
  if (a.mask != nullptr) {
    segments.mask(z, n, a.mask + mask_byte(a.shape, e));
  }
  S* y = static_cast<S*>(a.y) + e;
  if (a.activation == Activation::relu) {
    store_relu_segment(z, n, y);
    return;
  }
  if (a.activation != Activation::identity) segments.activate(z, n, static_cast<T>(a.parameter));
  store_segment(z, n, y);
}

// relu(z1 + residual) and its mask, a block at a time. n: a multiple of kBlock.
template <bool kPlane, class S>
BRAZE_TARGET void apply_masked(const S* x, const S* residual, S* y, int64_t n,
                               const Constants<float>& k, uint8_t* mask) {
  for (int64_t j = 0; j < n; j += kBlock) {
    float z[kBlock], added[kBlock];
    load_block(x + j, z);
    load_block(residual + j, added);
#pragma omp simd
    for (int64_t l = 0; l < kBlock; ++l) {
      const int64_t c = kPlane ? 0 : j + l;
      z[l] = normalize(z[l], k.mean[c], k.scale[c], k.shift[c]) + added[l];
    }
    mask_segment<Activation::relu>(z, kBlock, mask + j / kByte);
#pragma omp simd
    for (int64_t l = 0; l < kBlock; ++l) z[l] = activate<Activation::relu>(z[l], 0.0f);
    store_block(z, y + j);
  }
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_matrix(const ApplyArgs& a, const Matrix& m, const Constants<T>& k,
                               const Constants<T>& k2) {
  if constexpr (!std::is_same_v<S, F16>) {
    if (is_direct<S>(a)) return apply_direct_matrix<kPlane, S>(a, m, k);
  }
  for (int64_t r = 0; r < m.rows + (m.tail > 0); ++r) {
    const int64_t columns = r < m.rows ? m.columns : m.tail, e = m.offset + r * m.stride;
    int64_t done = 0;
    if constexpr (std::is_same_v<T, float>) {
      if (is_masked_relu(a)) {
        done = columns / kBlock * kBlock;
        apply_masked<kPlane>(static_cast<const S*>(a.input[0].x) + e,
                             static_cast<const S*>(a.residual) + e, static_cast<S*>(a.y) + e, done,
                             k, a.mask + mask_byte(a.shape, e));
      }
    }
    for (int64_t j = done; j < columns; j += kSegment) {
      const int64_t at = kPlane ? 0 : j;
      apply_segment<kPlane, S>(a, e + j, std::min(kSegment, columns - j), k.at(at), k2.at(at));
    }
  }
}

// The constants of an input as columns.
template <class T>
struct ConstantColumns {
  BRAZE_TARGET Constants<T> of(const void* stats, int64_t c, int64_t begin, int64_t width,
                               int64_t pixels, bool planar) {
    const T* s = static_cast<const T*>(stats);
    if (s == nullptr) return {};
    s += begin;
    return {as_columns(s + kMean * c, width, pixels, planar, columns[0]),
            as_columns(s + kScale * c, width, pixels, planar, columns[1]),
            as_columns(s + kShift * c, width, pixels, planar, columns[2])};
  }
  alignas(64) T columns[3][2 * kHalf];
};

template <class S>
BRAZE_TARGET void apply_of(const ApplyArgs& a, const Tiles& tiles, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const int64_t c = a.shape.c;
  if (!a.shape.channels_last) {
    ConstantColumns<T> columns;
    const Constants<T> k = columns.of(a.input[0].stats, c, 0, c, 1, false);
    const Constants<T> k2 = columns.of(a.input[1].stats, c, 0, c, 1, false);
    while (end > begin) {
      Matrix m = tiles.matrix(--end);
      const int64_t channel = tiles.first_channel(end), planes = m.rows;
      m.rows = 1;
      for (int64_t i = 0; i < planes; ++i, m.offset += m.stride) {
        apply_matrix<true, S>(a, m, k.at(channel + i), k2.at(channel + i));
      }
    }
    return;
  }
  ConstantColumns<T> columns[2];
  const bool planar = kPack<S> > 1 && is_direct<S>(a);
  const int64_t slab = planar ? std::min(c, 2 * kHalf) : c;
  for (int64_t first = 0; first < c; first += slab) {
    const int64_t width = std::min(slab, c - first);
    const Constants<T> k = columns[0].of(a.input[0].stats, c, first, width, tiles.fold, planar);
    const Constants<T> k2 = columns[1].of(a.input[1].stats, c, first, width, tiles.fold, planar);
    for (int64_t tile = end; tile > begin;) {
      Matrix m = tiles.matrix(--tile);
      m.offset += first;
      m.columns = tiles.fold * width;
      apply_matrix<false, S>(a, m, k, k2);
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
