#include "../set_begin.h"
//
#include "../activation_loops.h"
#include "../batch_norm_channels.h"
#include "../batch_norm_kernels.h"

namespace braze::cpu::BRAZE_SET {
namespace {

// ------------------------------------------------------------------ d, the gradient of z1 + z2

// What is known of a call when it is compiled. Every hot case is a line of hot_loop.
struct GradientCase {
  Activation activation = Activation::identity;
  bool two = false;   // a second normalised input
  bool mask = false;  // says where the derivative is 1; elsewhere it is 0
};

// What d is made of, from some element on. All but dy and x[0] may be null.
template <class S>
struct Sources {
  const S *dy, *dy2, *x[2], *residual;
};

template <class S>
Sources<S> sources_at(const BackwardArgs& a, int64_t e) {
  return {moved<S>(a.dy, e),
          moved<S>(a.dy2, e),
          {moved<S>(a.input[0].x, e), moved<S>(a.input[1].x, e)},
          moved<S>(a.residual, e)};
}

// dy + dy2, rounded to their type as autograd's sums are: so it can be kept in memory, exactly.
template <class S, class N, class T = Arithmetic<S>>
BRAZE_INLINE Vec<T> gradient_of_output(const Sources<S>& from, int64_t j, N n) {
  Vec<T> d = Vec<T>::load(from.dy + j, n);
  if (from.dy2 != nullptr) {
    d += Vec<T>::load(from.dy2 + j, n);
    S sum[kWidth<T>];
    d.store(sum);
    d = Vec<T>::load(sum);
  }
  return d;
}

// z of n elements from j, whose constants are from column c.
template <class S, class T, class N>
BRAZE_INLINE Vec<T> joined(const Sources<S>& from, bool two, const Vec<T>* x, int64_t j, int64_t c,
                           N n, const Constants<T>* k) {
  Vec<T> z = k[0].z(x[0], c, n);
  if (two) {
    z += k[1].z(x[1], c, n);
  } else if (from.residual != nullptr) {
    z += Vec<T>::load(from.residual + j, n);
  }
  return z;
}

// d of a vector of elements in a hot case; x: of the same elements. bits: those of element j.
template <GradientCase kCase, class S, class T>
BRAZE_INLINE Vec<T> gradient(const Sources<S>& from, const uint8_t* bits, const Vec<T>* x,
                             int64_t j, int64_t c, const Constants<T>* k) {
  const Vec<T> d = gradient_of_output(from, j, Whole{});
  if constexpr (kCase.mask) {
    return select(Vec<T>::Mask::from_bits(load_bits<Vec<T>>(bits)), d, Vec<T>(0));
  } else if constexpr (kCase.activation != Activation::identity) {
    return activation_gradient<kCase.activation>(
        d, joined(from, kCase.two, x, j, c, Whole{}, k), T(0));
  } else {
    return d;
  }
}

// d of n <= kPiece elements from e in any case.
template <class S, class T>
void gradient_any(const BackwardArgs& a, int64_t e, int64_t n, const uint8_t* bits, int64_t column,
                  const Spread& to, const Constants<T>* k, T* d) {
  const Sources<S> from = sources_at<S>(a, e);
  for (int64_t j = 0; j < n; j += kWidth<T>) gradient_of_output(from, j, n - j).store(d + j);
  if (a.activation == Activation::identity) return;
  const T parameter = static_cast<T>(a.parameter);
  if (bits != nullptr) {
    uint8_t own[kPiece / 8] = {};
    std::memcpy(own, bits, static_cast<size_t>((n + 7) / 8));
    const Slopes<T> slopes = slopes_of(a.activation, parameter);
    for (int64_t j = 0; j < n; j += kWidth<T>) {
      const auto upper = Vec<T>::Mask::from_bits(load_bits<Vec<T>>(own + j / 8));
      two_slope_gradient(Vec<T>::load(d + j), upper, slopes.upper, slopes.lower).store(d + j);
    }
    return;
  }
  alignas(64) T z[kPiece];
  for (int64_t j = 0; j < n; j += kWidth<T>) {
    Vec<T> x[2] = {Vec<T>::load(from.x[0] + j, n - j), 0};
    if (from.x[1] != nullptr) x[1] = Vec<T>::load(from.x[1] + j, n - j);
    joined(from, from.x[1] != nullptr, x, j, to.at(column + j), n - j, k).store(z + j);
  }
  activations.of<T>().gradient[static_cast<int>(a.activation)](d, z, whole_vectors<T>(n), parameter);
}

// The case that a loop is compiled for, if there is one: Loops::hot<S, case>, else Loops::any<S>.
template <class S, class Loops>
auto* loop_for(const BackwardArgs& a) {
  using A = Activation;
  const bool two = a.input[1].x != nullptr, mask = a.mask != nullptr;
  [[maybe_unused]] const auto is = [&](A act, bool is_two) {
    return a.activation == act && two == is_two && !mask;
  };
#if BRAZE_LEVEL > 0
  const Slopes<double> slopes = slopes_of(a.activation, a.parameter);
  if (mask && !two && slopes.upper == 1 && slopes.lower == 0) {
    return Loops::template hot<S, {A::relu, false, true}>;
  }
  if (is(A::identity, false)) return Loops::template hot<S, {A::identity}>;
  if (is(A::relu, false)) return Loops::template hot<S, {A::relu}>;
  if (is(A::identity, true)) return Loops::template hot<S, {A::identity, true}>;
  if (is(A::relu, true)) return Loops::template hot<S, {A::relu, true}>;
  if (is(A::relu6, false)) return Loops::template hot<S, {A::relu6}>;
  if (is(A::hardswish, false)) return Loops::template hot<S, {A::hardswish}>;
  if constexpr (sizeof(S) < 8) {
    if (is(A::silu, false)) return Loops::template hot<S, {A::silu}>;
  }
#endif
  return Loops::template any<S>;
}

// The bits of kCount rows, if there is a mask.
template <int kCount>
struct BitsOfRows {
  BitsOfRows(const BackwardArgs& a, int64_t e, int64_t stride, int64_t n) {
    if (a.mask == nullptr) return;
    for (int r = 0; r < kCount; ++r) row[r] = rows[r].of(a.shape, a.mask, e + r * stride, n);
  }
  BRAZE_INLINE const uint8_t* at(int r, int64_t j) const {
    return row[r] == nullptr ? nullptr : row[r] + j / 8;
  }
  const uint8_t* row[kCount] = {};
  JoinedBits rows[kCount];
};

// ---------------------------------------------------------------------- reduce

constexpr int kGradientRows = 4;  // rows whose sums are formed in registers

// The sums of d and of d (x - mean), by column.
template <class T>
struct Sums {
  alignas(64) T grad[kMatrixColumns], input[2][kMatrixColumns];
};

template <class T, class N>
BRAZE_INLINE void add_to(T* sums, const Vec<T>& more, N n) {
  (Vec<T>::load(sums, n) + more).store(sums, n);
}

struct Reduce {
  // kCount rows from e, what no hot case serves.
  template <int kCount, class S, class T>
  [[gnu::noinline]] static void rows(const BackwardArgs& a, int64_t e, int64_t stride, int64_t n,
                                     const BitsOfRows<kCount>& bits, int64_t column,
                                     const Spread& to, const Constants<T>* k, Sums<T>& sums,
                                     S* kept) {
    const bool two = a.input[1].x != nullptr;
    for (int64_t begin = 0; begin < n; begin += kPiece) {
      const int64_t count = std::min(kPiece, n - begin), c = column + begin;
      alignas(64) T d[kCount][kPiece];
      for (int r = 0; r < kCount; ++r) {
        const int64_t at = e + r * stride + begin;
        gradient_any<S>(a, at, count, bits.at(r, c), c, to, k, d[r]);
        if (kept == nullptr) continue;
        for (int64_t j = 0; j < count; j += kWidth<T>) {
          Vec<T>::load(d[r] + j).store(kept + at + j, count - j);
        }
      }
      for (int64_t j = 0; j < count; j += kWidth<T>) {
        Vec<T> grad = 0;
        for (int r = 0; r < kCount; ++r) grad += Vec<T>::load(d[r] + j);
        add_to(sums.grad + c + j, grad, count - j);
        for (int side = 0; side < 1 + two; ++side) {
          Vec<T> unused = 0, input = 0;
          const Vec<T> mean = Vec<T>::load(k[side].mean + to.at(c + j), count - j);
          for (int r = 0; r < kCount; ++r) {
            const S* x = moved<S>(a.input[side].x, e + r * stride + begin + j);
            add_gradient(Vec<T>::load(d[r] + j), Vec<T>::load(x, count - j), mean, unused, input);
          }
          add_to(sums.input[side] + c + j, input, count - j);
        }
      }
    }
  }

  template <class S>
  static void any(const BackwardArgs& a, const Matrix& m, const Spread& to,
                  const Constants<Arithmetic<S>>* k, Sums<Arithmetic<S>>& sums, S* kept) {
    rows_at_once<kGradientRows>(m, [&](auto count, int64_t e, int64_t stride, int64_t n) {
      constexpr int kCount = decltype(count)::value;
      rows<kCount>(a, e, stride, n, BitsOfRows<kCount>(a, e, stride, n), 0, to, k, sums, kept);
    });
  }

  template <class S, GradientCase kCase>
  static void hot(const BackwardArgs& a, const Matrix& m, const Spread& to,
                  const Constants<Arithmetic<S>>* k, Sums<Arithmetic<S>>& sums, S* kept) {
    using T = Arithmetic<S>;
    rows_at_once<kGradientRows>(m, [&](auto count, int64_t e, int64_t stride, int64_t columns) {
      constexpr int kCount = decltype(count)::value;
      const Sources<S> from = sources_at<S>(a, e);
      const BitsOfRows<kCount> bits(a, e, stride, columns);
      S* const keep = kept == nullptr ? nullptr : kept + e;
      int64_t j = 0;
      for (; j + kWidth<T> <= columns; j += kWidth<T>) {
        const int64_t c = to.at(j);
        Vec<T> grad = 0, input[2] = {0, 0}, d[kCount], unused = 0;
        const Vec<T> mean = Vec<T>::load(k[0].mean + c);
        unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
          const int64_t at = r * stride + j;
          Vec<T> x[2];
          x[0] = Vec<T>::load(from.x[0] + at);
          if constexpr (kCase.two) x[1] = Vec<T>::load(from.x[1] + at);
          d[r] = gradient<kCase>(from, bits.at(r, j), x, at, c, k);
          add_gradient(d[r], x[0], mean, grad, input[0]);
          if constexpr (kCase.two) {
            add_gradient(d[r], x[1], Vec<T>::load(k[1].mean + c), unused, input[1]);
          }
        });
        // After all loads: one whose address agrees in its last 12 bits waits for the store.
        if (keep != nullptr) {
          unrolled<kCount>([&](auto r) BRAZE_LAMBDA { d[r].store(keep + r * stride + j); });
        }
        add_to(sums.grad + j, grad, Whole{});
        add_to(sums.input[0] + j, input[0], Whole{});
        if constexpr (kCase.two) add_to(sums.input[1] + j, input[1], Whole{});
      }
      if (j < columns) rows<kCount>(a, e + j, stride, columns - j, bits, j, to, k, sums, kept);
    });
  }
};

template <class S>
void reduce_of(const BackwardArgs& a, const Geometry& g, int64_t begin, int64_t end, double* parts,
               void* keep) {
  using T = Arithmetic<S>;
  S* const kept = static_cast<S*>(keep);
  const auto loop = loop_for<S, Reduce>(a);
  const int used = a.input[1].x != nullptr ? 3 : 2;
  const Spread to = {g.fold, g.span, g.one_channel};
  alignas(64) T columns[6][kMatrixColumns];
  alignas(64) double block[kMatrixColumns];
  Sums<T> sums;
  T* const rows[] = {sums.grad, sums.input[0], sums.input[1]};
  Constants<T> k[2];
  for (int64_t u = begin; u < end; ++u) {
    const int64_t part = u / g.slabs, column = u % g.slabs;
    const int64_t first = g.first_channel(column), width = g.last_channel(column) - first;
    for (int i = 0; i < 2; ++i) {
      k[i].set(a.input[i].stats, a.shape.c, first, width, to, columns + 3 * i);
    }
    double* const into = parts + part * kPartRows * g.row() + first;
    for (int s = 0; s < used; ++s) std::fill_n(into + s * g.row(), width, 0.0);
    for (int64_t b = g.first_block(part); b < g.first_block(part + 1); ++b) {
      Matrix m = g.matrix(column, b);
      const int64_t count = std::max(m.columns, m.tail);
      for (int s = 0; s < used; ++s) std::fill_n(rows[s], count, T(0));
      for (int64_t i = g.images(b); i > 0; --i, m.offset += g.image_stride()) {
        loop(a, m, to, k, sums, kept);
      }
      for (int s = 0; s < used; ++s) {
        fold_columns(rows[s], count, width, g.span, block);
        each_vector<double>(width, [&](int64_t j, auto n) {
          add_to(into + s * g.row() + j, Doubles::load(block + j, n), n);
        });
      }
    }
  }
}

// ------------------------------------------------------------------ apply_grad

// The coefficients of an input, by column.
template <class T>
struct Coefficients {
  const T *on_grad = nullptr, *on_input = nullptr, *constant = nullptr;

  void set(const void* coefficients, int64_t c, int64_t first, int64_t width, const Spread& to,
           T (*columns)[kMatrixColumns]) {
    if (coefficients == nullptr) return;
    const T* f = static_cast<const T*>(coefficients) + first;
    on_grad = spread(f + kOnGrad * c, width, to, columns[0]);
    on_input = spread(f + kOnInput * c, width, to, columns[1]);
    constant = spread(f + kConstant * c, width, to, columns[2]);
  }
};

template <class T>
struct InputConstants {
  Constants<T> k[2];
  Coefficients<T> f[2];
  bool frozen;  // stats are constants

  // dx of d and x.
  template <class N>
  BRAZE_INLINE Vec<T> dx(int side, Vec<T> d, Vec<T> x, int64_t c, N n) const {
    const Vec<T> on_grad = Vec<T>::load(f[side].on_grad + c, n);
    if (frozen) return input_gradient(d, on_grad);
    return input_gradient(d, x, Vec<T>::load(k[side].mean + c, n), on_grad,
                          Vec<T>::load(f[side].on_input + c, n),
                          Vec<T>::load(f[side].constant + c, n));
  }
};

struct ApplyGrad {
  // n elements from e, what no hot case serves.
  template <class S, class T>
  [[gnu::noinline]] static void row(const BackwardArgs& a, int64_t e, int64_t n,
                                    const uint8_t* bits, int64_t column, const Spread& to,
                                    const InputConstants<T>& k) {
    for (int64_t begin = 0; begin < n; begin += kPiece) {
      const int64_t count = std::min(kPiece, n - begin), at = e + begin, c = column + begin;
      alignas(64) T d[kPiece];
      // All of dy is read before anything is written: dx may be dy.
      gradient_any<S>(a, at, count, bits == nullptr ? nullptr : bits + begin / 8, c, to, k.k, d);
      for (int side = 0; side < 2; ++side) {
        S* dx = static_cast<S*>(a.grad[side].dx);
        if (dx == nullptr) continue;
        const S* x = moved<S>(a.input[side].x, at);
        for (int64_t j = 0; j < count; j += kWidth<T>) {
          k.dx(side, Vec<T>::load(d + j), Vec<T>::load(x + j, count - j), to.at(c + j), count - j)
              .store(dx + at + j, count - j);
        }
      }
      if (S* out = static_cast<S*>(a.grad_residual)) {
        for (int64_t j = 0; j < count; j += kWidth<T>) {
          Vec<T>::load(d + j).store(out + at + j, count - j);
        }
      }
    }
  }

  template <class S>
  static void any(const BackwardArgs& a, const Matrix& m, const Spread& to,
                  const InputConstants<Arithmetic<S>>& k) {
    rows_at_once<1>(m, [&](auto, int64_t e, int64_t stride, int64_t n) {
      row<S>(a, e, n, BitsOfRows<1>(a, e, stride, n).row[0], 0, to, k);
    });
  }

  template <class S, GradientCase kCase>
  static void hot(const BackwardArgs& a, const Matrix& m, const Spread& to,
                  const InputConstants<Arithmetic<S>>& k) {
    using T = Arithmetic<S>;
    constexpr bool kNeedsX = kCase.activation != Activation::identity && !kCase.mask;
    rows_at_once<1>(m, [&](auto, int64_t e, int64_t stride, int64_t columns) {
      const Sources<S> from = sources_at<S>(a, e);
      const BitsOfRows<1> bits(a, e, stride, columns);
      S* const dx = static_cast<S*>(a.grad[0].dx) + e;
      S* const dx2 = static_cast<S*>(a.grad[1].dx) + e;
      int64_t j = 0;
      for (; j + kWidth<T> <= columns; j += kWidth<T>) {
        const int64_t c = to.at(j);
        Vec<T> x[2] = {0, 0};
        if (kNeedsX || !k.frozen) {
          x[0] = Vec<T>::load(from.x[0] + j);
          if constexpr (kCase.two) x[1] = Vec<T>::load(from.x[1] + j);
        }
        const Vec<T> d = gradient<kCase>(from, bits.at(0, j), x, j, c, k.k);
        k.dx(0, d, x[0], c, Whole{}).store(dx + j);
        if constexpr (kCase.two) k.dx(1, d, x[1], c, Whole{}).store(dx2 + j);
      }
      if (j < columns) row<S>(a, e + j, columns - j, bits.at(0, j), j, to, k);
    });
  }
};

template <class S>
void apply_grad_of(const BackwardArgs& a, const Tiles& tiles, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const bool two = a.input[1].x != nullptr;
  // Of one input, or of both: what the hot loops write.
  const bool all = a.grad[0].dx != nullptr && two == (a.grad[1].dx != nullptr);
  const auto loop = all && a.grad_residual == nullptr ? loop_for<S, ApplyGrad>(a)
                                                      : &ApplyGrad::any<S>;
  const Spread to = {tiles.fold, tiles.span, tiles.one_channel};
  alignas(64) T columns[12][kMatrixColumns];
  InputConstants<T> k;
  k.frozen = !a.batch_statistics;
  for_each_matrix(
      tiles, begin, end,
      [&](int64_t first, int64_t width) {
        for (int i = 0; i < 2; ++i) {
          k.k[i].set(a.input[i].stats, a.shape.c, first, width, to, columns + 6 * i);
          k.f[i].set(a.grad[i].coefficients, a.shape.c, first, width, to, columns + 6 * i + 3);
        }
      },
      [&](const Matrix& m) { loop(a, m, to, k); });
}

}  // namespace

void reduce(const BackwardArgs& a, const Geometry& g, int64_t begin, int64_t end, double* parts,
            void* kept) {
#if BRAZE_LEVEL == 3
  if (a.shape.dtype != DType::bf16 || kept == nullptr) {
    return avx512::reduce(a, g, begin, end, parts, kept);
  }
  reduce_of<Bf16>(a, g, begin, end, parts, kept);
#else
  with_dtype(a.shape.dtype,
             [&](auto element) { reduce_of<decltype(element)>(a, g, begin, end, parts, kept); });
#endif
}

#if BRAZE_LEVEL != 3

void finish_reduce(const BackwardArgs& a, const Geometry& g, const double* parts, int64_t begin,
                   int64_t end) {
  with_arithmetic(a.shape.dtype, [&](auto number) {
    finish_reduce_of<decltype(number)>(a, g, parts, begin, end);
  });
}

void coefficients(const CoefficientsArgs& a) {
  with_arithmetic(a.shape.dtype, [&](auto number) { coefficients_of<decltype(number)>(a); });
}

#endif

void apply_grad(const BackwardArgs& a, const Tiles& tiles, int64_t begin, int64_t end) {
#if BRAZE_LEVEL == 3
  if (a.shape.dtype != DType::bf16) return avx512::apply_grad(a, tiles, begin, end);
  apply_grad_of<Bf16>(a, tiles, begin, end);
#else
  with_dtype(a.shape.dtype,
             [&](auto element) { apply_grad_of<decltype(element)>(a, tiles, begin, end); });
#endif
}

}  // namespace braze::cpu::BRAZE_SET
#include "../set_end.h"
