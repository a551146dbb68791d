// The sums of x - shift and its square. Included once per instruction set.

#include "batch_norm_channels.inl"

namespace BRAZE_ISA {

constexpr int kMomentRows = 8;        // rows whose sums are formed in registers
constexpr int64_t kMomentTile = 128;  // elements of a converted tile

template <int kCount, int kP, class S, class T>
BRAZE_TARGET inline void add_moment_columns(const S* __restrict x, int64_t stride, int64_t n,
                                            const T* __restrict shift, T* __restrict sum,
                                            T* __restrict square) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    T s[kP] = {}, q[kP] = {};
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      T v[kP];
      load_elements<kP>(x + r * stride + j * kP, v);
#pragma GCC unroll 2
      for (int p = 0; p < kP; ++p) add_moment(v[p], shift[p * kHalf + j], s[p], q[p]);
    }
#pragma GCC unroll 2
    for (int p = 0; p < kP; ++p) {
      sum[p * kHalf + j] += s[p];
      square[p * kHalf + j] += q[p];
    }
  }
}

template <int kCount, class S, class T>
BRAZE_TARGET void add_moment_rows(const S* x, int64_t stride, int64_t columns, const T* shift,
                                  T* sum, T* square) {
  constexpr int kP = kPack<S>;
  const int64_t n = columns / kP;
  add_moment_columns<kCount, kP>(x, stride, n, shift, sum, square);
  if (columns % kP != 0) {
    add_moment_columns<kCount, 1>(x + n * kP, stride, 1, shift + n, sum + n, square + n);
  }
}

template <int kCount, class S, class T>
BRAZE_TARGET void add_moments_of_rows(const S* x, int64_t stride, int64_t columns, const T* shift,
                                      T* sum, T* square) {
  if constexpr (std::is_same_v<S, F16>) {
    alignas(64) T tile[kCount * kMomentTile];
    for (int64_t c = 0; c < columns; c += kMomentTile) {
      const int64_t n = std::min(kMomentTile, columns - c);
      for (int r = 0; r < kCount; ++r) widen(x + r * stride + c, tile + r * kMomentTile, n);
      add_moment_rows<kCount>(tile, kMomentTile, n, shift + c, sum + c, square + c);
    }
  } else {
    add_moment_rows<kCount>(x, stride, columns, shift, sum, square);
  }
}

template <class S, class T>
BRAZE_TARGET void add_moments_of_matrix(const S* x, const Matrix& m, const T* shift, T* sum,
                                        T* square) {
  x += m.offset;
  const int64_t part = m.rows / kMomentRows;
  for (int64_t r = 0; r < part; ++r) {
    add_moments_of_rows<kMomentRows>(x + r * m.stride, part * m.stride, m.columns, shift, sum,
                                     square);
  }
  for (int64_t r = part * kMomentRows; r < m.rows + (m.tail > 0); ++r) {
    add_moments_of_rows<1>(x + r * m.stride, m.stride, r < m.rows ? m.columns : m.tail, shift, sum,
                           square);
  }
}

template <class S, class T>
BRAZE_TARGET inline void add_moment_lane(const S* x, int64_t k, T shift, T* sum, T* square) {
  constexpr int kP = kPack<S>;
  T v[kP];
  load_elements<kP>(x, v);
#pragma GCC unroll 2
  for (int p = 0; p < kP; ++p) {
    add_moment(v[p], shift, sum[p * (kLanes / kP) + k], square[p * (kLanes / kP) + k]);
  }
}

// Element j of each plane goes to a lane that depends on j % kLanes.
template <class S, class T>
BRAZE_TARGET void add_moments_of_planes(const S* x, int64_t stride, int64_t planes, int64_t n,
                                        T shift, T* sums, T* squares) {
  constexpr int kP = kPack<S>;
  T sum[kLanes], square[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) {
    sum[k] = sums[k];
    square[k] = squares[k];
  }
  for (int64_t r = 0; r < planes; ++r, x += stride) {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      for (int64_t k = 0; k < kLanes / kP; ++k) {
        add_moment_lane(x + j + k * kP, k, shift, sum, square);
      }
    }
    for (int64_t k = 0; k < (n - j) / kP; ++k) {
      add_moment_lane(x + j + k * kP, k, shift, sum, square);
    }
    if (n % kP != 0) {
      const int64_t k = (n - j) / kP;
      add_moment(T(from_storage(x[n - 1])), shift, sum[k], square[k]);
    }
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    sums[k] = sum[k];
    squares[k] = square[k];
  }
}

// Numbers near the means of `width` channels, repeated in all columns.
template <class S, class T>
BRAZE_TARGET void shifts_of_channels(const S* x, int64_t c, int64_t width, int64_t pixels,
                                     int64_t columns, T* shift) {
  pixels = std::min<int64_t>(pixels, 8);
  T pixel[kMatrixColumns];
  for (int64_t j = 0; j < width; ++j) shift[j] = T(0);
  for (int64_t p = 0; p < pixels; ++p) {
    load_segment(x + p * c, width, pixel);
    for (int64_t j = 0; j < width; ++j) shift[j] += pixel[j];
  }
  for (int64_t j = 0; j < width; ++j) shift[j] = make_shift(shift[j], static_cast<T>(pixels));
  for (int64_t j = width; j < columns; ++j) shift[j] = shift[j - width];
}

template <class S>
BRAZE_TARGET Arithmetic<S> shift_of_plane(const S* x, int64_t spatial) {
  const int64_t n = std::min<int64_t>(spatial, 16);
  Arithmetic<S> sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += from_storage(x[j]);
  return make_shift(sum, static_cast<Arithmetic<S>>(n));
}

// The sums of one block, in double, by channel.
template <class S>
struct BlockMoments {
  using T = Arithmetic<S>;
  double count;
  alignas(64) double shifts[kMatrixColumns], sums[kMatrixColumns], squares[kMatrixColumns];
  alignas(64) T plain[kMatrixColumns], shift[2 * kHalf], sum[2 * kHalf], square[2 * kHalf];
};

// In double: for values whose squares are beyond fp32.
template <class S>
BRAZE_TARGET void sum_block_exactly(const S* x, const Matrix& m, int64_t width,
                                    BlockMoments<S>& out) {
  for (int64_t j = 0; j < width; ++j) out.shifts[j] = out.sums[j] = out.squares[j] = 0;
  for (int64_t r = 0; r < m.rows + (m.tail > 0); ++r) {
    for (int64_t j = 0; j < (r < m.rows ? m.columns : m.tail); ++j) {
      const double value = from_storage(x[m.offset + r * m.stride + j]);
      add_moment(value, 0.0, out.sums[j % width], out.squares[j % width]);
    }
  }
}

template <class S>
BRAZE_TARGET void sum_block_of_pixels(const S* x, const Matrix& m, int64_t c, int64_t width,
                                      BlockMoments<S>& out) {
  const int64_t columns = std::max(m.columns, m.tail);
  const int64_t pixels = m.rows * (m.columns / width) + m.tail / width;
  shifts_of_channels(x + m.offset, c, width, pixels, columns, out.plain);
  for (int64_t j = 0; j < width; ++j) out.shifts[j] = static_cast<double>(out.plain[j]);
  const Arithmetic<S>* shift = out.plain;
  if (kPack<S> > 1) {
    to_planar(out.plain, columns, out.shift);
    shift = out.shift;
  }
  clear_columns<S>(columns, out.sum);
  clear_columns<S>(columns, out.square);
  add_moments_of_matrix(x, m, shift, out.sum, out.square);
  out.count = static_cast<double>(pixels);
  sum_of_pixels<S>(out.sum, width, columns, out.sums);
  sum_of_pixels<S>(out.square, width, columns, out.squares);
}

template <class S>
BRAZE_TARGET void sum_block_of_planes(const S* x, const Matrix& m, BlockMoments<S>& out) {
  using T = Arithmetic<S>;
  x += m.offset;
  const T shift = shift_of_plane(x, m.columns);
  alignas(64) T sum[kLanes] = {}, square[kLanes] = {};
  if constexpr (std::is_same_v<S, F16>) {
    alignas(64) T tile[kSegment];
    for (int64_t r = 0; r < m.rows; ++r) {
      for (int64_t j = 0; j < m.columns; j += kSegment) {
        const int64_t n = std::min(kSegment, m.columns - j);
        widen(x + r * m.stride + j, tile, n);
        add_moments_of_planes(tile, 0, 1, n, shift, sum, square);
      }
    }
  } else {
    add_moments_of_planes(x, m.stride, m.rows, m.columns, shift, sum, square);
  }
  out.count = static_cast<double>(m.rows * m.columns);
  out.shifts[0] = static_cast<double>(shift);
  out.sums[0] = sum_of_lanes(sum);
  out.squares[0] = sum_of_lanes(square);
}

template <class S>
BRAZE_TARGET void statistics_of(const StatisticsArgs& a, const Geometry& g, int64_t begin,
                                int64_t end, double* parts) {
  const S* x = static_cast<const S*>(a.x);
  BlockMoments<S> block;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t part = u / g.columns(), column = u % g.columns();
    const int64_t first = g.first_channel(column), width = g.last_channel(column) - first;
    double* shift = parts + (part * kPartRows + kPartShift) * g.row() + first;
    double* sum = parts + (part * kPartRows + kPartSum) * g.row() + first;
    double* square = parts + (part * kPartRows + kPartSquare) * g.row() + first;
    double count = 0;
    for (int64_t b = g.first_block(part); b < g.first_block(part + 1); ++b) {
      const Matrix m = g.matrix(column, b);
      g.shape.channels_last ? sum_block_of_pixels(x, m, g.shape.c, width, block)
                            : sum_block_of_planes(x, m, block);
      double overflow = 0;
      for (int64_t j = 0; j < width; ++j) overflow += block.squares[j] - block.squares[j];
      if (overflow != 0) sum_block_exactly(x, m, width, block);
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) {
        Moments total = {shift[j], count, sum[j], square[j]};
        merge_moments(total, {block.shifts[j], block.count, block.sums[j], block.squares[j]});
        shift[j] = total.shift;
        sum[j] = total.sum;
        square[j] = total.square;
      }
      count += block.count;
    }
  }
}

}  // namespace BRAZE_ISA
