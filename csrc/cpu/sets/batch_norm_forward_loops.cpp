#include "../set_begin.h"
//
#include "../activation_loops.h"
#include "../batch_norm_channels.h"
#include "../batch_norm_kernels.h"

namespace braze::cpu::BRAZE_SET {
namespace {

// ------------------------------------------------------------------ statistics

#if BRAZE_LEVEL != 3  // avx512's serve

constexpr int kMomentRows = 8;  // rows whose sums are formed in registers

// kPlane: all columns are one channel's, and have kPlaneSums sums. V: Vec, or HotVec.
template <int kCount, bool kPlane, class V, class S, class T>
void add_moments(const S* x, int64_t stride, int64_t columns, const T* shift, T* sum, T* square) {
  constexpr int kVecs = kPlane ? kPlaneSums / V::kLanes : 1;
  constexpr int64_t kStep = kVecs * V::kLanes;
  int64_t j = 0;
  if constexpr (kPlane) {
    constexpr bool kReorders = V::template kInPairs<S>;
    const V near = V::load(shift);
    V s[kVecs], q[kVecs];
    for (T* sums : {sum, square}) {
      if (kReorders) reorder_pairs<true>(sums, kPlaneSums);
    }
    unrolled<kVecs>([&](auto v) BRAZE_LAMBDA {
      s[v] = V::load(sum + v * V::kLanes);
      q[v] = V::load(square + v * V::kLanes);
    });
    for (; j + kStep <= columns; j += kStep) {
      unrolled<kVecs>([&](auto v) BRAZE_LAMBDA {
        add_moment(V::load_in_any_order(x + j + v * V::kLanes), near, s[v], q[v]);
      });
    }
    unrolled<kVecs>([&](auto v) BRAZE_LAMBDA {
      s[v].store(sum + v * V::kLanes);
      q[v].store(square + v * V::kLanes);
    });
    for (T* sums : {sum, square}) {
      if (kReorders) reorder_pairs<false>(sums, kPlaneSums);
    }
  } else {
    for (; j + kStep <= columns; j += kStep) {
      const V near = V::load(shift + j);
      V s = 0, q = 0;
      unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
        add_moment(V::load_in_any_order(x + r * stride + j), near, s, q);
      });
      add_to(sum + j, s, Whole{});
      add_to(square + j, q, Whole{});
    }
  }
  each_vector<Vec<T>>(columns - j, [&](int64_t i, auto n) BRAZE_LAMBDA {
    const int64_t column = j + i, at = kPlane ? column % kPlaneSums : column;
    const Vec<T> near = Vec<T>::load(kPlane ? shift : shift + column, n);
    Vec<T> s = 0, q = 0;
    unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
      add_moment(Vec<T>::load(x + r * stride + column, n), near, s, q);
    });
    add_to(sum + at, s, n);
    add_to(square + at, q, n);
  });
}

// The sums of one block, by column and by channel.
template <class T>
struct BlockMoments {
  alignas(64) double shifts[kMatrixColumns], sums[kMatrixColumns], squares[kMatrixColumns];
  alignas(64) T near[kMatrixColumns], shift[kMatrixColumns];
  alignas(64) T sum[kMatrixColumns], square[kMatrixColumns];
};

// Numbers near the means of the matrix's channels.
template <class S, class T>
void shifts_of(const S* x, const Geometry& g, int64_t width, int64_t pixels, T* shift) {
  if (g.shape.channels_last) {
    pixels = std::min<int64_t>(pixels, 8);
    each_vector<Vec<T>>(width, [&](int64_t j, auto n) {
      Vec<T> sum = 0;
      for (int64_t p = 0; p < pixels; ++p) sum += Vec<T>::load(x + p * g.shape.c + j, n);
      make_shift(sum, Vec<T>(static_cast<T>(pixels))).store(shift + j, n);
    });
    return;
  }
  const int64_t count = std::min<int64_t>(g.shape.spatial, 16);
  for (int64_t c = 0; c < width; ++c) {
    const T sum = static_cast<T>(sum_of(x + c * g.shape.spatial, count));
    shift[c] = make_shift(sum, static_cast<T>(count));
  }
}

// Adds the sums in double: for values whose squares are beyond fp32.
template <class S, class T>
void sum_exactly(const S* x, const Geometry& g, const Matrix& m, int64_t width,
                 BlockMoments<T>& out) {
  for (int64_t r = 0; r < m.rows + (m.tail > 0); ++r) {
    for (int64_t j = 0; j < (r < m.rows ? m.columns : m.tail); ++j) {
      const int64_t c = g.one_channel ? 0 : g.span > 1 ? j / g.span : j % width;
      const double value = from_storage(x[r * m.stride + j]);
      add_moment(value, 0.0, out.sums[c], out.squares[c]);
    }
  }
}

template <class S, class T>
void sum_block(const S* x, const Geometry& g, int64_t column, int64_t b, int64_t width,
               BlockMoments<T>& out) {
  Matrix m = g.matrix(column, b);
  const int64_t columns = g.one_channel ? kPlaneSums : std::max(m.columns, m.tail);
  const int64_t images = g.images(b);
  const Spread to = {g.fold, g.span, g.one_channel, kPairs<S>};
  shifts_of(x + m.offset, g, width, g.block_count(b), out.near);
  each_vector<Doubles>(
      width, [&](int64_t c, auto n) { Doubles::load(out.near + c, n).store(out.shifts + c, n); });
  const T* shift = spread(out.near, width, to, out.shift);
  std::fill_n(out.sum, columns, T(0));
  std::fill_n(out.square, columns, T(0));
  if (g.one_channel) {
    for (int64_t i = 0; i < images; ++i) {
      add_moments<1, true, HotVec<S>>(x + m.offset + i * g.image_stride(), 0, m.columns, shift,
                                      out.sum, out.square);
    }
  } else {
    rows_at_once<kMomentRows>(m, [&](auto count, int64_t e, int64_t stride) {
      add_moments<decltype(count)::value, false, HotVec<S>>(x + e, stride, m.columns, shift,
                                                            out.sum, out.square);
    });
    for (T* sums : {out.sum, out.square}) {
      if (kPairs<S>) reorder_pairs<false>(sums, m.columns);
    }
    if (m.tail > 0) {
      shift = spread(out.near, width, to.in_order(), out.shift);
      add_moments<1, false, Vec<T>>(x + m.offset + m.rows * m.stride, 0, m.tail, shift, out.sum,
                                    out.square);
    }
  }
  fold_columns(out.sum, columns, width, g.column_span(), out.sums);
  fold_columns(out.square, columns, width, g.column_span(), out.squares);
  Doubles overflow = 0;
  each_vector<Doubles>(width, [&](int64_t c, auto n) {
    const Doubles square = Doubles::load(out.squares + c, n);
    overflow += square - square;
  });
  if ((overflow == Doubles(0)).bits() == (1u << kWidth<double>)-1) return;
  for (int64_t c = 0; c < width; ++c) out.shifts[c] = out.sums[c] = out.squares[c] = 0;
  for (int64_t i = 0; i < images; ++i)
    sum_exactly(x + i * g.image_stride() + m.offset, g, m, width, out);
}

template <class S>
void statistics_of(const StatisticsArgs& a, const Geometry& g, int64_t begin, int64_t end,
                   double* parts) {
  BlockMoments<Arithmetic<S>> block;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t part = u / g.slabs, column = u % g.slabs;
    const int64_t first = g.first_channel(column), width = g.last_channel(column) - first;
    double* const shift = parts + (part * kPartRows + kPartShift) * g.row() + first;
    double* const sum = parts + (part * kPartRows + kPartSum) * g.row() + first;
    double* const square = parts + (part * kPartRows + kPartSquare) * g.row() + first;
    double count = 0;
    for (int64_t b = g.first_block(part); b < g.first_block(part + 1); ++b) {
      sum_block(static_cast<const S*>(a.x), g, column, b, width, block);
      const double own = static_cast<double>(g.block_count(b));
      each_vector<Doubles>(width, [&](int64_t j, auto n) {
        MomentsOf<Doubles> all = {Doubles::load(shift + j, n), count, Doubles::load(sum + j, n),
                                  Doubles::load(square + j, n)};
        merge_moments(all, {Doubles::load(block.shifts + j, n), own,
                            Doubles::load(block.sums + j, n), Doubles::load(block.squares + j, n)});
        all.shift.store(shift + j, n);
        all.sum.store(sum + j, n);
        all.square.store(square + j, n);
      });
      count += own;
    }
  }
}

}  // namespace

void statistics(const StatisticsArgs& a, const Geometry& g, int64_t begin, int64_t end,
                double* parts) {
  with_dtype(a.shape.dtype,
             [&](auto element) { statistics_of<decltype(element)>(a, g, begin, end, parts); });
}

void finish_statistics(const StatisticsArgs& a, const Geometry& g, const double* parts,
                       int64_t begin, int64_t end) {
  with_arithmetic(a.shape.dtype, [&](auto number) {
    finish_statistics_of<decltype(number)>(a, g, parts, begin, end);
  });
}

void combine(const CombineArgs& a) {
  with_arithmetic(a.shape.dtype, [&](auto number) { combine_of<decltype(number)>(a); });
}

void from_running(const FromRunningArgs& a) {
  with_arithmetic(a.shape.dtype, [&](auto number) { from_running_of<decltype(number)>(a); });
}

namespace {
#endif

// ----------------------------------------------------------------------- apply

// What is known of a call when it is compiled. Every hot case is a line of apply_loop.
struct ApplyCase {
  Activation activation = Activation::identity;
  bool two = false;  // a second normalised input
  bool mask = false;
};

template <class S>
struct Rows : Summands<S> {
  S* y;
};

template <class S>
Rows<S> rows_at(const ApplyArgs& a, int64_t e) {
  return {summands_at<S>(a, e), static_cast<S*>(a.y) + e};
}

// What no hot case serves: any arguments, any number of elements.
template <class S, class T>
[[gnu::noinline]] void apply_any(const ApplyArgs& a, int64_t e, int64_t n, uint8_t* bits,
                                 int64_t column, const Spread& to, const Constants<T>* k) {
  const ActivationLoops<T>& loops = activations.of<T>();
  const int act = static_cast<int>(a.activation);
  alignas(64) T z[kPiece];
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t count = std::min(kPiece, n - begin);
    const Rows<S> rows = rows_at<S>(a, e + begin);
    each_vector<Vec<T>>(count, [&](int64_t j, auto left) BRAZE_LAMBDA {
      rows.z(j, to.at(column + begin + j), left, k).store(z + j);
    });
    if (bits != nullptr) {
      uint8_t own[kPiece / 8];
      loops.upper[act](z, count, own);
      if (count % 8 != 0) own[count / 8] &= static_cast<uint8_t>((1 << count % 8) - 1);
      std::memcpy(bits + begin / 8, own, static_cast<size_t>((count + 7) / 8));
    }
    if (a.activation != Activation::identity) {
      loops.value[act](z, count, static_cast<T>(a.parameter));
    }
    each_vector<Vec<T>>(count, [&](int64_t j, auto left)
                                   BRAZE_LAMBDA { Vec<T>::load(z + j).store(rows.y + j, left); });
  }
}

constexpr int kApplyRows = 4;  // rows at once

template <class S, ApplyCase kCase>
void apply_hot(const ApplyArgs& a, const Matrix& m, const Spread& to,
               const Constants<Arithmetic<S>>* constants) {
  using T = Arithmetic<S>;
  using V = HotVec<S, kCase.mask>;
  const Constants<T> k[2] = {constants[0], constants[1]};
  const int64_t column = to.at(-1), columns = m.columns;
  rows_at_once<kApplyRows>(m, [&](auto count, int64_t e, int64_t stride) {
    constexpr int kCount = decltype(count)::value;
    const Rows<S> rows = rows_at<S>(a, e);
    const S* const added = kCase.two ? rows.x[1] : rows.residual;
    JoinedBits joined_bits[kCount];
    uint8_t* bits[kCount] = {};
    if constexpr (kCase.mask) {
      for (int r = 0; r < kCount; ++r) {
        bits[r] = joined_bits[r].to_write(a.shape, a.mask, e + r * stride, columns);
      }
    }
    int64_t j = 0;
    for (; j + V::kLanes <= columns; j += V::kLanes) {
      // Before any store, which might change them for all that the compiler knows.
      const int64_t c = j & column;
      const V mean = V::load(k[0].mean + c), scale = V::load(k[0].scale + c),
              shift = V::load(k[0].shift + c);
      unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
        const int64_t at = r * stride + j;
        V z = normalize(V::load_in_any_order(rows.x[0] + at), mean, scale, shift);
        if constexpr (kCase.two) {
          z += k[1].z(V::load_in_any_order(added + at), c, Whole{});
        } else if (added != nullptr) {
          z += V::load_in_any_order(added + at);
        }
        if constexpr (kCase.mask) {
          store_bits<V>(derivative_is_upper<kCase.activation>(z).bits(), bits[r] + j / 8);
        }
        by_register(
            [](const auto& one) BRAZE_LAMBDA { return activate<kCase.activation>(one, T(0)); }, z)
            .store_in_any_order(rows.y + at);
      });
    }
    for (int r = 0; r < kCount; ++r) {
      if (j < columns) {
        apply_any<S>(a, e + r * stride + j, columns - j, kCase.mask ? bits[r] + j / 8 : nullptr, j,
                     to, constants);
      }
      if constexpr (kCase.mask) {
        joined_bits[r].written(a.shape, a.mask, e + r * stride, columns);
      }
    }
  });
}

// A row that no hot case serves.
template <class S>
void apply_row(const ApplyArgs& a, int64_t e, int64_t columns, const Spread& to,
               const Constants<Arithmetic<S>>* k) {
  JoinedBits joined_bits;
  uint8_t* const bits =
      a.mask != nullptr ? joined_bits.to_write(a.shape, a.mask, e, columns) : nullptr;
  apply_any<S>(a, e, columns, bits, 0, to, k);
  if (bits != nullptr) joined_bits.written(a.shape, a.mask, e, columns);
}

template <class S>
void apply_cold(const ApplyArgs& a, const Matrix& m, const Spread& to,
                const Constants<Arithmetic<S>>* k) {
  rows_at_once<1>(m, [&](auto, int64_t e, int64_t) { apply_row<S>(a, e, m.columns, to, k); });
}

template <class S>
auto* apply_loop(const ApplyArgs& a) {
  using A = Activation;
  const bool two = a.input[1].x != nullptr, mask = a.mask != nullptr;
  [[maybe_unused]] const auto is = [&](A act, bool is_two, bool is_masked) {
    return a.activation == act && two == is_two && mask == is_masked;
  };
#if BRAZE_LEVEL > 0
  if (is(A::relu, false, false)) return apply_hot<S, {A::relu}>;
  if (is(A::identity, false, false)) return apply_hot<S, {A::identity}>;
  if (is(A::relu, false, true)) return apply_hot<S, {A::relu, false, true}>;
  if (is(A::relu, true, false)) return apply_hot<S, {A::relu, true}>;
  if (is(A::relu6, false, false)) return apply_hot<S, {A::relu6}>;
  if (is(A::hardswish, false, false)) return apply_hot<S, {A::hardswish}>;
  if constexpr (sizeof(S) < 8) {
    if (is(A::silu, false, false)) return apply_hot<S, {A::silu}>;
  }
#endif
  return apply_cold<S>;
}

template <class S>
void apply_of(const ApplyArgs& a, const Tiles& tiles, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const auto loop = apply_loop<S>(a);
  const Spread to = {tiles.fold, tiles.span, tiles.one_channel,
                     kPairs<S> && loop != &apply_cold<S> && a.mask == nullptr};
  alignas(64) T columns[6][kMatrixColumns];
  Constants<T> k[2];
  for_each_matrix(
      tiles, to, begin, end,
      [&](int64_t first, int64_t width, const Spread& spread) {
        for (int i = 0; i < 2; ++i) {
          k[i].set(a.input[i].stats, a.shape.c, first, width, spread, columns + 3 * i);
        }
      },
      [&](const Matrix& m) { loop(a, m, to, k); },
      [&](int64_t e, int64_t n) { apply_row<S>(a, e, n, to.in_order(), k); });
}

}  // namespace

void apply(const ApplyArgs& a, const Tiles& tiles, int64_t begin, int64_t end) {
#if BRAZE_LEVEL == 3
  if (a.shape.dtype != DType::bf16) return avx512::apply(a, tiles, begin, end);
  apply_of<Bf16>(a, tiles, begin, end);
#else
  with_dtype(a.shape.dtype,
             [&](auto element) { apply_of<decltype(element)>(a, tiles, begin, end); });
#endif
}

}  // namespace braze::cpu::BRAZE_SET
#include "../set_end.h"
