// The sums of d and d (x - mean). Included once per instruction set.

#include "batch_norm_blocks.inl"

namespace BRAZE_ISA {

constexpr int kGradientRows = 4;        // rows whose sums are formed in registers
constexpr int64_t kGradientTile = 128;  // columns of a tile of d

// D is what memory holds of d: dy, or a tile. Only where both are dy's type are columns planar.
// kept: other memory; written if kKeep.
template <int kCount, int kP, Activation kA, bool kKeep, class D, class S, class T>
BRAZE_TARGET inline void add_gradient_columns(const D* __restrict d, int64_t d_stride,
                                              const S* __restrict x, int64_t stride, int64_t n,
                                              const Constants<T>& k, T* __restrict grad,
                                              T* __restrict grad_input, S* __restrict kept) {
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
        const int64_t c = p * kHalf + j;
        if constexpr (kNeedsZ<kA>) {
          const T z = normalize(value[p], mean[c], scale[c], shift[c]);
          gradient[p] = activation_gradient<kA>(gradient[p], z, T(0));
        }
        add_gradient(gradient[p], value[p], mean[c], g[p], i[p]);
      }
      if constexpr (kKeep) store_elements<kP>(gradient, kept + r * stride + j * kP);
    }
#pragma GCC unroll 2
    for (int p = 0; p < kP; ++p) {
      grad[p * kHalf + j] += g[p];
      grad_input[p * kHalf + j] += i[p];
    }
  }
}

template <int kCount, Activation kA, bool kKeep = false, class D, class S, class T>
BRAZE_TARGET void add_gradient_rows(const D* d, int64_t d_stride, const S* x, int64_t stride,
                                    int64_t columns, const Constants<T>& k, T* grad, T* grad_input,
                                    S* kept = nullptr) {
  constexpr int kP = std::is_same_v<D, S> ? kPack<S> : 1;
  const int64_t n = columns / kP;
  add_gradient_columns<kCount, kP, kA, kKeep>(d, d_stride, x, stride, n, k, grad, grad_input, kept);
  if (columns % kP != 0) {
    add_gradient_columns<kCount, 1, kA, kKeep>(d + n * kP, d_stride, x + n * kP, stride, 1, k.at(n),
                                               grad + n, grad_input + n, moved(kept, n * kP));
  }
}

// `count` rows from element e, where d is not direct, or kept.
template <int kCount, class S, class T>
BRAZE_TARGET void add_tiles_of_rows(const BackwardArgs& a, int64_t e, int64_t stride,
                                    int64_t columns, const BackwardConstants<T>& k,
                                    const GradientSums<T>& sums, S* kept) {
  alignas(64) T d[kCount * kGradientTile];
  for (int64_t c = 0; c < columns; c += kGradientTile) {
    const int64_t n = std::min(kGradientTile, columns - c);
    const BackwardConstants<T> at = k.at(c);
    for (int r = 0; r < kCount; ++r) {
      gradient_segment<false, S>(a, e + r * stride + c, n, at, d + r * kGradientTile);
      if (kept != nullptr) store_segment(d + r * kGradientTile, n, kept + e + r * stride + c);
    }
    T unused[kGradientTile];
    for (int side = 0; side < 2; ++side) {
      const S* x = static_cast<const S*>(a.input[side].x);
      if (x == nullptr) continue;
      x += e + c;
      T* grad = side == 0 ? sums.grad + c : unused;
      if (side == 1) {
        for (int64_t j = 0; j < n; ++j) unused[j] = T(0);
      }
      if constexpr (std::is_same_v<S, F16>) {
        alignas(64) T tile[kCount * kGradientTile];
        for (int r = 0; r < kCount; ++r) widen(x + r * stride, tile + r * kGradientTile, n);
        add_gradient_rows<kCount, Activation::identity>(d, kGradientTile, tile, kGradientTile, n,
                                                        at.input[side], grad, sums.input[side] + c);
      } else {
        add_gradient_rows<kCount, Activation::identity>(d, kGradientTile, x, stride, n,
                                                        at.input[side], grad, sums.input[side] + c);
      }
    }
  }
}

template <int kCount, class S, class T>
BRAZE_TARGET void add_direct_rows(const BackwardArgs& a, int64_t e, int64_t stride, int64_t columns,
                                  const Constants<T>& k, const GradientSums<T>& sums, S* kept) {
  const S* d = static_cast<const S*>(a.dy) + e;
  const S* x = static_cast<const S*>(a.input[0].x) + e;
  const auto add = [&]<Activation kA, bool kKeep = false>() {
    add_gradient_rows<kCount, kA, kKeep>(d, stride, x, stride, columns, k, sums.grad, sums.input[0],
                                         moved(kept, e));
  };
  if constexpr (std::is_same_v<S, T>) {
    if (kept != nullptr) return add.template operator()<Activation::silu, true>();
  }
  with_direct_activation(a.activation, add);
}

template <int kCount, class S, class T>
BRAZE_TARGET void add_gradients_of_rows(const BackwardArgs& a, int64_t e, int64_t stride,
                                        int64_t columns, const BackwardConstants<T>& k,
                                        const GradientSums<T>& sums, S* kept) {
  if constexpr (!std::is_same_v<S, F16>) {
    if (is_direct_reduce(a, kept)) {
      add_direct_rows<kCount>(a, e, stride, columns, k.input[0], sums, kept);
      return;
    }
  }
  int64_t done = 0;
  if constexpr (std::is_same_v<T, float>) {
    const int64_t whole = columns / kBlock * kBlock;
    const auto add = [&]<int kSides, Activation kA>() {
      add_block_columns<kSides, kA, kCount>(gradient_source(a, kept), e, stride, whole, k, sums);
    };
    // A mask's rows begin with a byte.
    if ((a.mask == nullptr || a.shape.c % kByte == 0) && with_gradient_blocks(a, add)) done = whole;
  }
  add_tiles_of_rows<kCount>(a, e + done, stride, columns - done, k.at(done), sums.at(done), kept);
}

template <class S, class T>
BRAZE_TARGET void add_gradients_of_matrix(const BackwardArgs& a, const Matrix& m,
                                          const BackwardConstants<T>& k,
                                          const GradientSums<T>& sums, S* kept) {
  const int64_t part = m.rows / kGradientRows;
  for (int64_t r = 0; r < part; ++r) {
    add_gradients_of_rows<kGradientRows>(a, m.offset + r * m.stride, part * m.stride, m.columns, k,
                                         sums, kept);
  }
  for (int64_t r = part * kGradientRows; r < m.rows + (m.tail > 0); ++r) {
    add_gradients_of_rows<1>(a, m.offset + r * m.stride, m.stride, r < m.rows ? m.columns : m.tail,
                             k, sums, kept);
  }
}

template <Activation kA, int kP, bool kKeep, class D, class S, class T>
BRAZE_TARGET inline void add_gradient_lane(const D* d, const S* x, int64_t k, T mean, T scale,
                                           T shift, T* grad, T* grad_input, S* kept) {
  T value[kP], gradient[kP];
  load_elements<kP>(x, value);
  load_elements<kP>(d, gradient);
#pragma GCC unroll 2
  for (int p = 0; p < kP; ++p) {
    const int64_t lane = p * (kLanes / kP) + k;
    if constexpr (kNeedsZ<kA>) {
      const T z = normalize(value[p], mean, scale, shift);
      gradient[p] = activation_gradient<kA>(gradient[p], z, T(0));
    }
    add_gradient(gradient[p], value[p], mean, grad[lane], grad_input[lane]);
  }
  if constexpr (kKeep) store_elements<kP>(gradient, kept);
}

// Element j of each plane goes to a lane that depends on j % kLanes.
template <Activation kA, bool kKeep = false, class D, class S, class T>
BRAZE_TARGET void add_gradients_of_planes(const D* __restrict d, const S* __restrict x,
                                          int64_t stride, int64_t planes, int64_t n,
                                          const Constants<T>& c, T* grads, T* grad_inputs,
                                          S* __restrict kept = nullptr) {
  constexpr int kP = std::is_same_v<D, S> ? kPack<S> : 1;
  const T mean = *c.mean, scale = *c.scale, shift = *c.shift;
  T grad[kLanes], grad_input[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) {
    grad[k] = grads[k];
    grad_input[k] = grad_inputs[k];
  }
  for (int64_t r = 0; r < planes; ++r, x += stride, d += stride) {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      for (int64_t k = 0; k < kLanes / kP; ++k) {
        const int64_t e = j + k * kP;
        add_gradient_lane<kA, kP, kKeep>(d + e, x + e, k, mean, scale, shift, grad, grad_input,
                                         kKeep ? kept + e : kept);
      }
    }
    for (int64_t k = 0; k < (n - j) / kP; ++k) {
      const int64_t e = j + k * kP;
      add_gradient_lane<kA, kP, kKeep>(d + e, x + e, k, mean, scale, shift, grad, grad_input,
                                       kKeep ? kept + e : kept);
    }
    if (n % kP != 0) {
      add_gradient_lane<kA, 1, kKeep>(d + n - 1, x + n - 1, (n - j) / kP, mean, scale, shift, grad,
                                      grad_input, moved(kept, n - 1));
    }
    kept = moved(kept, stride);
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    grads[k] = grad[k];
    grad_inputs[k] = grad_input[k];
  }
}

template <class S, class T>
BRAZE_TARGET void add_direct_planes(const BackwardArgs& a, const Matrix& m, const Constants<T>& k,
                                    const GradientSums<T>& sums, S* kept) {
  const S* d = static_cast<const S*>(a.dy) + m.offset;
  const S* x = static_cast<const S*>(a.input[0].x) + m.offset;
  const auto add = [&]<Activation kA, bool kKeep = false>() {
    add_gradients_of_planes<kA, kKeep>(d, x, m.stride, m.rows, m.columns, k, sums.grad,
                                       sums.input[0], moved(kept, m.offset));
  };
  if constexpr (std::is_same_v<S, T>) {
    if (kept != nullptr) return add.template operator()<Activation::silu, true>();
  }
  with_direct_activation(a.activation, add);
}

template <class S, class T>
BRAZE_TARGET void add_gradients_of_channel(const BackwardArgs& a, const Matrix& m,
                                           const BackwardConstants<T>& k,
                                           const GradientSums<T>& sums, S* kept) {
  if constexpr (!std::is_same_v<S, F16>) {
    if (is_direct_reduce(a, kept)) {
      add_direct_planes(a, m, k.input[0], sums, kept);
      return;
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    const auto add = [&]<int kSides, Activation kA>() {
      const GradientSource<S> source = gradient_source(a, kept);
      for (int64_t e = m.offset; e < m.offset + m.rows * m.stride; e += m.stride) {
        const uint8_t* bits = kSides == 1 ? a.mask + mask_byte(a.shape, e) : nullptr;
        add_block_plane<kSides, kA>(source, bits, e, m.columns, k, sums);
      }
    };
    if (with_gradient_blocks(a, add)) return;
  }
  T d[kSegment], buffer[kSegment], unused[kLanes] = {};
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t j = 0; j < m.columns; j += kSegment) {
      const int64_t e = m.offset + r * m.stride + j, n = std::min(kSegment, m.columns - j);
      gradient_segment<true, S>(a, e, n, k, d);
      if (kept != nullptr) store_segment(d, n, kept + e);
      for (int side = 0; side < 2; ++side) {
        if (a.input[side].x == nullptr) continue;
        const S* x = static_cast<const S*>(a.input[side].x) + e;
        add_gradients_of_planes<Activation::identity>(d, readable(x, n, buffer), 0, 1, n,
                                                      k.input[side], side == 0 ? sums.grad : unused,
                                                      sums.input[side]);
      }
    }
  }
}

// P: the type in whose order the columns are. kept: where d is left; null: nowhere.
template <class P, class S>
BRAZE_TARGET void reduce_in_order(const BackwardArgs& a, const Geometry& g, int64_t begin,
                                  int64_t end, double* parts, S* kept) {
  using T = Arithmetic<S>;
  const int used = a.input[1].x != nullptr ? 3 : 2;
  BackwardColumns<T> constants;
  alignas(64) T sums[3][2 * kHalf];
  alignas(64) double block[kMatrixColumns];
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
      const Matrix m = g.matrix(column, b);
      const GradientSums<T> to = {sums[0], {sums[1], sums[2]}};
      if (planes) {
        for (int s = 0; s < used; ++s) std::fill_n(sums[s], kLanes, T(0));
        add_gradients_of_channel(a, m, k, to, kept);
        for (int s = 0; s < used; ++s) into[s * g.row()] += sum_of_lanes(sums[s]);
        continue;
      }
      const int64_t columns = std::max(m.columns, m.tail);
      for (int s = 0; s < used; ++s) clear_columns<P>(columns, sums[s]);
      add_gradients_of_matrix(a, m, k, to, kept);
      for (int s = 0; s < used; ++s) {
        sum_of_pixels<P>(sums[s], width, columns, block);
        for (int64_t j = 0; j < width; ++j) into[s * g.row() + j] += block[j];
      }
    }
  }
}

template <class S>
BRAZE_TARGET void reduce_of(const BackwardArgs& a, const Geometry& g, int64_t begin, int64_t end,
                            double* parts, void* kept) {
  S* d = static_cast<S*>(kept);
  const bool direct = is_direct_reduce(a, d);
  direct ? reduce_in_order<S>(a, g, begin, end, parts, d)
         : reduce_in_order<Arithmetic<S>>(a, g, begin, end, parts, d);
}

}  // namespace BRAZE_ISA
