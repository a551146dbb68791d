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

constexpr int kApplyStreams = 4;  // rows at once

template <bool kPlane, Activation kA, bool kResidual, class S, class T>
BRAZE_TARGET void apply_directly(const ApplyArgs& a, const Matrix& m, const Constants<T>& k) {
  const S* x = static_cast<const S*>(a.input[0].x);
  const S* residual = static_cast<const S*>(a.residual);
  S* y = static_cast<S*>(a.y);
  rows_at_once<kPlane ? 1 : kApplyStreams>(
      m, [&]<int kCount>(int64_t e, int64_t stride, int64_t n) {
        apply_rows<kCount, kPlane, kA, kResidual>(x + e, moved(residual, e), y + e, stride, n, k);
      });
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

// Whether apply_blocks can do it: relu(z1 + residual) and its mask, or activation(z1 + z2).
inline bool is_blocked(const ApplyArgs& a) {
  const bool masked = a.mask != nullptr;
  if (a.input[1].x != nullptr) return !masked && is_direct_activation(a.activation);
  return masked && a.activation == Activation::relu && a.residual != nullptr;
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_segment(const ApplyArgs& a, int64_t e, int64_t n, const Constants<T>& k,
                                const Constants<T>& k2) {
  T z[kSegment];
  normalize_inputs<kPlane, S>(a.input, a.residual, e, n, k, k2, z);
  if (a.mask != nullptr) {
    const auto mask = with_activation<has_two_slopes>(
        a.activation, [](auto constant) { return mask_segment<constant(), T>; });
    mask(z, n, a.mask + mask_byte(a.shape, e));
  }
  S* y = static_cast<S*>(a.y) + e;
  if (a.activation == Activation::relu) {
    store_relu_segment(z, n, y);
    return;
  }
  if (a.activation != Activation::identity) {
    const auto activate = with_activation(
        a.activation, [](auto constant) { return activate_segment<constant(), T>; });
    activate(z, n, static_cast<T>(a.parameter));
  }
  store_segment(z, n, y);
}

// `kCount` rows, a block at a time: z1 + residual and its mask, or z1 + z2. n: a multiple of
// kBlock.
template <int kCount, bool kPlane, bool kMask, Activation kA, class S>
BRAZE_TARGET void apply_block_columns(const ApplyArgs& a, int64_t e, int64_t stride, int64_t n,
                                      const Constants<float>& k, const Constants<float>& k2) {
  const S* x = static_cast<const S*>(a.input[0].x) + e;
  const S* added = static_cast<const S*>(kMask ? a.residual : a.input[1].x) + e;
  S* y = static_cast<S*>(a.y) + e;
  uint8_t* mask = kMask ? a.mask + mask_byte(a.shape, e) : nullptr;
  const int64_t mask_stride = mask_byte(a.shape, stride);
  for (int64_t j = 0; j < n; j += kBlock) {
    float z[kCount][kBlock];
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      float z2[kBlock];
      prefetch_ahead(x + r * stride + j);
      prefetch_ahead(added + r * stride + j);
      load_block(x + r * stride + j, z[r]);
      load_block(added + r * stride + j, z2);
#pragma omp simd
      for (int64_t l = 0; l < kBlock; ++l) {
        const int64_t c = kPlane ? 0 : j + l;
        if constexpr (!kMask) z2[l] = normalize(z2[l], k2.mean[c], k2.scale[c], k2.shift[c]);
        z[r][l] = normalize(z[r][l], k.mean[c], k.scale[c], k.shift[c]) + z2[l];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      if constexpr (kMask) mask_segment<kA>(z[r], kBlock, mask + r * mask_stride + j / kByte);
#pragma omp simd
      for (int64_t l = 0; l < kBlock; ++l) z[r][l] = activate<kA>(z[r][l], 0.0f);
      store_block(z[r], y + r * stride + j);
    }
  }
}

template <int kCount, bool kPlane, class S>
BRAZE_TARGET void apply_blocks(const ApplyArgs& a, int64_t e, int64_t stride, int64_t n,
                               const Constants<float>& k, const Constants<float>& k2) {
  if (a.mask != nullptr) {
    apply_block_columns<kCount, kPlane, true, Activation::relu, S>(a, e, stride, n, k, k2);
    return;
  }
  with_direct_activation(a.activation, [&]<Activation kA>() {
    apply_block_columns<kCount, kPlane, false, kA, S>(a, e, stride, n, k, k2);
  });
}

template <bool kPlane, class S, class T>
BRAZE_TARGET void apply_matrix(const ApplyArgs& a, const Matrix& m, const Constants<T>& k,
                               const Constants<T>& k2) {
  if constexpr (!std::is_same_v<S, F16>) {
    if (is_direct<S>(a)) return apply_direct_matrix<kPlane, S>(a, m, k);
  }
  rows_at_once<kPlane ? 1 : kApplyStreams>(
      m, [&]<int kCount>(int64_t e, int64_t stride, int64_t n) {
        int64_t done = 0;
        if constexpr (std::is_same_v<T, float>) {
          if (is_blocked(a)) {
            done = n / kBlock * kBlock;
            apply_blocks<kCount, kPlane, S>(a, e, stride, done, k, k2);
          }
        }
        for (int r = 0; r < kCount; ++r, e += stride) {
          for (int64_t j = done; j < n; j += kSegment) {
            const int64_t at = kPlane ? 0 : j;
            apply_segment<kPlane, S>(a, e + j, std::min(kSegment, n - j), k.at(at), k2.at(at));
          }
        }
      });
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
  with_dtype(a.shape.dtype,
             [&](auto element) { statistics_of<decltype(element)>(a, g, begin, end, parts); });
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
  with_dtype(a.shape.dtype,
             [&](auto element) { apply_of<decltype(element)>(a, tiles, begin, end); });
}

}  // namespace BRAZE_ISA
