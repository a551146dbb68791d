#include "../set_begin.h"
//
#include "../activation_loops.h"
#include "../batch_norm_channels.h"
#include "../batch_norm_kernels.h"

namespace braze::cpu::BRAZE_SET {
namespace {

// ------------------------------------------------------------------ d, the gradient of z1 + z2

// What a loop knows of its call when it is compiled.
struct GradientCase {
  Activation activation = Activation::identity;
  bool two = false;       // a second normalised input
  bool mask = false;      // says where the derivative is 1; elsewhere it is 0
  bool residual = false;  // added before the activation
  bool second = false;    // a second gradient of y
  bool frozen = false;    // statistics are constants

  bool operator==(const GradientCase&) const = default;
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

// What a group of a hot case is made of.
template <GradientCase kCase, bool kPairs, int kVecs, class S, class T>
struct Group {
  static constexpr bool kNeedsZ = kCase.activation != Activation::identity && !kCase.mask;
  static constexpr int kInputs = kCase.two ? 2 : 1;
  Vec<T> d[kVecs], x[kInputs][kVecs], residual[kCase.residual ? kVecs : 1];

  // dy + dy2 and the other tensors.
  BRAZE_INLINE void load(const Sources<S>& from, int64_t j) {
    load_group<kPairs>(from.dy + j, d);
    if constexpr (kCase.second) {
      Vec<T> other[kVecs];
      load_group<kPairs>(from.dy2 + j, other);
      unrolled<kVecs>([&](auto v) BRAZE_LAMBDA { d[v] += other[v]; });
      if constexpr (!std::is_same_v<S, T>) {
        S sum[kVecs * kWidth<T>];
        store_group<kPairs>(d, sum);
        load_group<kPairs>(sum, d);
      }
    }
    if constexpr (kNeedsZ || !kCase.frozen) {
      unrolled<kInputs>([&](auto i) BRAZE_LAMBDA { load_group<kPairs>(from.x[i] + j, x[i]); });
    }
    if constexpr (kCase.residual) load_group<kPairs>(from.residual + j, residual);
  }
  // d of vector v, whose constants are from column c. bits: those of the group.
  BRAZE_INLINE void differentiate(int v, const uint8_t* bits, int64_t c, const Constants<T>* k) {
    if constexpr (kCase.mask) {
      const uint32_t own = load_bits<Vec<T>>(bits + v * kWidth<T> / 8);
      d[v] = select(Vec<T>::Mask::from_bits(own), d[v], Vec<T>(0));
    } else if constexpr (kNeedsZ) {
      Vec<T> z = k[0].z(x[0][v], c, Whole{});
      if constexpr (kCase.two) z += k[1].z(x[1][v], c, Whole{});
      if constexpr (kCase.residual) z += residual[v];
      d[v] = activation_gradient<kCase.activation>(d[v], z, T(0));
    }
  }
};

// d of n <= kPiece elements from e in any case.
template <class S, class T>
void gradient_any(const BackwardArgs& a, int64_t e, int64_t n, const uint8_t* bits, int64_t column,
                  const Spread& to, const Constants<T>* k, T* d) {
  const Sources<S> from = sources_at<S>(a, e);
  each_vector<T>(n, [&](int64_t j, auto left)
                        BRAZE_LAMBDA { gradient_of_output(from, j, left).store(d + j); });
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
  each_vector<T>(n, [&](int64_t j, auto left) BRAZE_LAMBDA {
    Vec<T> x[2] = {Vec<T>::load(from.x[0] + j, left), 0};
    if (from.x[1] != nullptr) x[1] = Vec<T>::load(from.x[1] + j, left);
    joined(from, from.x[1] != nullptr, x, j, to.at(column + j), left, k).store(z + j);
  });
  activations.of<T>().gradient[static_cast<int>(a.activation)](d, z, whole_vectors<T>(n),
                                                               parameter);
}

// The hot cases, each with loops of its own.
template <GradientCase... kCases>
struct Cases {
  template <class S, class Loops, class Loop>
  static void choose(const GradientCase& is, Loop& loop) {
    (([&] {
       if constexpr (!kCases.frozen || Loops::kMayBeFrozen) {
         if (is == kCases) loop = Loops::template hot<S, kCases>;
       }
     }()),
     ...);
  }
};
using HotGradients =
    Cases<GradientCase{}, GradientCase{.activation = Activation::relu},
          GradientCase{.activation = Activation::relu6},
          GradientCase{.activation = Activation::hardswish}, GradientCase{.mask = true},
          GradientCase{.mask = true, .second = true}, GradientCase{.two = true},
          GradientCase{.activation = Activation::relu, .two = true},
          GradientCase{.activation = Activation::relu, .two = true, .second = true},
          GradientCase{.frozen = true},
          GradientCase{.activation = Activation::relu, .frozen = true}>;
using HotCurvedGradients = Cases<GradientCase{.activation = Activation::silu},
                                 GradientCase{.activation = Activation::silu, .residual = true}>;

// Loops::hot<S, the case> if it is one of them, else Loops::any<S>.
template <class S, class Loops>
auto* loop_for([[maybe_unused]] const BackwardArgs& a, [[maybe_unused]] bool frozen) {
  auto* loop = Loops::template any<S>;
#if BRAZE_LEVEL > 0
  const Slopes<double> slopes = slopes_of(a.activation, a.parameter);
  const bool one_or_zero = slopes.upper == 1 && slopes.lower == 0, mask = a.mask != nullptr;
  if (mask && !one_or_zero) return loop;
  const GradientCase is = {.activation = mask ? Activation::identity : a.activation,
                           .two = a.input[1].x != nullptr,
                           .mask = mask,
                           .residual = a.residual != nullptr && !mask,
                           .second = a.dy2 != nullptr,
                           .frozen = frozen};
  HotGradients::choose<S, Loops>(is, loop);
  if constexpr (sizeof(S) < 8) HotCurvedGradients::choose<S, Loops>(is, loop);
#endif
  return loop;
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

struct Reduce {
  static constexpr bool kMayBeFrozen = false;  // it is all the same to sums

  // kCount rows from e, what no hot case serves.
  template <int kCount, class S, class T>
  [[gnu::noinline]] static void rows(const BackwardArgs& a, int64_t e, int64_t stride, int64_t n,
                                     const BitsOfRows<kCount>& bits, int64_t column,
                                     const Spread& to, const Constants<T>* k, Sums<T>& sums,
                                     S* kept) {
    const bool two = a.input[1].x != nullptr;
    const int64_t wrap = to.one_channel ? kPlaneSums - 1 : -1;
    for (int64_t begin = 0; begin < n; begin += kPiece) {
      const int64_t count = std::min(kPiece, n - begin), c = column + begin;
      alignas(64) T d[kCount][kPiece];
      for (int r = 0; r < kCount; ++r) {
        const int64_t at = e + r * stride + begin;
        gradient_any<S>(a, at, count, bits.at(r, c), c, to, k, d[r]);
        if (kept == nullptr) continue;
        each_vector<T>(count, [&](int64_t j, auto left) BRAZE_LAMBDA {
          Vec<T>::load(d[r] + j).store(kept + at + j, left);
        });
      }
      each_vector<T>(count, [&](int64_t j, auto left) BRAZE_LAMBDA {
        Vec<T> grad = 0;
        for (int r = 0; r < kCount; ++r) grad += Vec<T>::load(d[r] + j);
        add_to(sums.grad + ((c + j) & wrap), grad, left);
        for (int side = 0; side < 1 + two; ++side) {
          Vec<T> unused = 0, input = 0;
          const Vec<T> mean = Vec<T>::load(k[side].mean + to.at(c + j), left);
          const S* x = static_cast<const S*>(a.input[side].x) + e + begin + j;
          for (int r = 0; r < kCount; ++r) {
            add_gradient(Vec<T>::load(d[r] + j), Vec<T>::load(x + r * stride, left), mean, unused,
                         input);
          }
          add_to(sums.input[side] + ((c + j) & wrap), input, left);
        }
      });
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
    if (to.one_channel) {
      hot_rows<S, kCase, 1, true>(a, m.offset, 0, m.columns, to, k, sums, kept);
      return;
    }
    rows_at_once<kGradientRows>(m, [&](auto count, int64_t e, int64_t stride, int64_t columns) {
      hot_rows<S, kCase, decltype(count)::value, false>(a, e, stride, columns, to, k, sums, kept);
    });
  }

  // kPlane: all columns are one channel's, and have kPlaneSums sums.
  template <class S, GradientCase kCase, int kCount, bool kPlane>
  static void hot_rows(const BackwardArgs& a, int64_t e, int64_t stride, int64_t columns,
                       const Spread& to, const Constants<Arithmetic<S>>* constants,
                       Sums<Arithmetic<S>>& sums, S* kept) {
    using T = Arithmetic<S>;
    constexpr bool kPairs = kInPairs<S> && !kCase.mask;
    constexpr int kVecs = kPairs ? 2 : 1, kInputs = kCase.two ? 2 : 1;
    constexpr int kGroups = kPlane ? kPlaneSums / (kVecs * kWidth<T>) : 1;
    constexpr int kStep = kGroups * kVecs * kWidth<T>;
    // Where d is mostly kept, it is stored after all loads: one whose address agrees in its last 12
    // bits waits for the store. Elsewhere registers are better spent.
    constexpr bool kKeepsLast = kCase.mask || kCase.two || kCase.second;
    constexpr bool kKeeps = kKeepsLast || kCase.activation == Activation::silu;
    const Constants<T> k[2] = {constants[0], constants[1]};
    const Sources<S> from = sources_at<S>(a, e);
    const BitsOfRows<kCount> bits(a, e, stride, columns);
    S* const keep = kept == nullptr ? nullptr : kept + e;
    Vec<T> grad[kGroups * kVecs], input[kInputs][kGroups * kVecs];
    const auto each_sum = [&](const auto& body) BRAZE_LAMBDA {
      unrolled<kGroups * kVecs>([&](auto v) BRAZE_LAMBDA {
        body(grad[v], sums.grad + v * kWidth<T>);
        unrolled<kInputs>([&](auto i)
                              BRAZE_LAMBDA { body(input[i][v], sums.input[i] + v * kWidth<T>); });
      });
    };
    const auto reorder = [&](auto to_pairs) BRAZE_LAMBDA {
      if constexpr (kPlane && kPairs) {
        reorder_pairs<decltype(to_pairs)::value>(sums.grad, kPlaneSums);
        unrolled<kInputs>([&](auto i) BRAZE_LAMBDA {
          reorder_pairs<decltype(to_pairs)::value>(sums.input[i], kPlaneSums);
        });
      }
    };
    if constexpr (kPlane) {
      reorder(std::true_type{});
      each_sum([](Vec<T>& sum, const T* at) BRAZE_LAMBDA { sum = Vec<T>::load(at); });
    }
    int64_t j = 0;
    for (; j + kStep <= columns; j += kStep) {
      if constexpr (!kPlane) each_sum([](Vec<T>& sum, const T*) BRAZE_LAMBDA { sum = 0; });
      Group<kCase, kPairs, kVecs, S, T> group[kCount][kGroups];
      const auto keep_group = [&](auto r, auto part) BRAZE_LAMBDA {
        store_group<kPairs>(group[r][part].d, keep + r * stride + j + part * kVecs * kWidth<T>);
      };
      unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
        unrolled<kGroups>([&](auto part) BRAZE_LAMBDA {
          const int64_t at = j + part * kVecs * kWidth<T>;
          auto& g = group[r][part];
          g.load(from, r * stride + at);
          unrolled<kVecs>([&](auto v) BRAZE_LAMBDA {
            constexpr int kSum = part * kVecs + v;
            const int64_t c = kPlane ? 0 : at + v * kWidth<T>;
            g.differentiate(v, bits.at(r, at), c, k);
            grad[kSum] += g.d[v];
            unrolled<kInputs>([&](auto i) BRAZE_LAMBDA {
              const Vec<T> mean = Vec<T>::load(k[i].mean + c);
              input[i][kSum] = fused_multiply_add(g.d[v], g.x[i][v] - mean, input[i][kSum]);
            });
          });
          if (kKeeps && !kKeepsLast && keep != nullptr) keep_group(r, part);
        });
      });
      if (kKeepsLast && keep != nullptr) {
        unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
          unrolled<kGroups>([&](auto part) BRAZE_LAMBDA { keep_group(r, part); });
        });
      }
      if constexpr (!kPlane) {
        each_sum([j](const Vec<T>& sum, T* at) BRAZE_LAMBDA { add_to(at + j, sum, Whole{}); });
      }
    }
    if constexpr (kPlane) {
      each_sum([](const Vec<T>& sum, T* at) BRAZE_LAMBDA { sum.store(at); });
      reorder(std::false_type{});
    }
    for (; j + kWidth<T> <= columns; j += kWidth<T>) {  // too few for a step
      Vec<T> more_grad = 0, more[kInputs];
      unrolled<kInputs>([&](auto i) BRAZE_LAMBDA { more[i] = 0; });
      const int64_t c = kPlane ? 0 : j, at = kPlane ? j % kPlaneSums : j;
      unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
        Group<kCase, false, 1, S, T> g;
        g.load(from, r * stride + j);
        g.differentiate(0, bits.at(r, j), c, k);
        more_grad += g.d[0];
        unrolled<kInputs>([&](auto i) BRAZE_LAMBDA {
          more[i] = fused_multiply_add(g.d[0], g.x[i][0] - Vec<T>::load(k[i].mean + c), more[i]);
        });
        if (kKeeps && keep != nullptr) g.d[0].store(keep + r * stride + j);
      });
      add_to(sums.grad + at, more_grad, Whole{});
      unrolled<kInputs>([&](auto i) BRAZE_LAMBDA { add_to(sums.input[i] + at, more[i], Whole{}); });
    }
    if (j < columns) {
      rows<kCount>(a, e + j, stride, columns - j, bits, j, to, constants, sums, kept);
    }
  }
};

template <class S>
void reduce_of(const BackwardArgs& a, const Geometry& g, int64_t begin, int64_t end, double* parts,
               void* keep) {
  using T = Arithmetic<S>;
  S* const kept = static_cast<S*>(keep);
  const auto loop = loop_for<S, Reduce>(a, false);
  const int used = a.input[1].x != nullptr ? 3 : 2;
  const bool in_pairs = kInPairs<S> && loop != &Reduce::any<S> && a.mask == nullptr;
  const Spread to = {g.fold, g.span, g.one_channel, in_pairs};
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
      const int64_t count = g.one_channel ? kPlaneSums : std::max(m.columns, m.tail);
      for (int s = 0; s < used; ++s) std::fill_n(rows[s], count, T(0));
      for (int64_t i = g.images(b); i > 0; --i, m.offset += g.image_stride()) {
        loop(a, m, to, k, sums, kept);
      }
      for (int s = 0; s < used; ++s) {
        if (in_pairs && !g.one_channel) reorder_pairs<false>(rows[s], count);
        fold_columns(rows[s], count, width, g.column_span(), block);
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

  BRAZE_INLINE void set(const void* coefficients, int64_t c, int64_t first, int64_t width,
                        const Spread& to, T (*columns)[kMatrixColumns]) {
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
  // dx of d and x.
  template <class N>
  BRAZE_INLINE Vec<T> dx(int side, Vec<T> d, Vec<T> x, int64_t c, N n, bool frozen) const {
    const Vec<T> on_grad = Vec<T>::load(f[side].on_grad + c, n);
    if (frozen) return input_gradient(d, on_grad);
    return input_gradient(d, x, Vec<T>::load(k[side].mean + c, n), on_grad,
                          Vec<T>::load(f[side].on_input + c, n),
                          Vec<T>::load(f[side].constant + c, n));
  }
};

struct ApplyGrad {
  static constexpr bool kMayBeFrozen = true;

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
        each_vector<T>(count, [&](int64_t j, auto left) BRAZE_LAMBDA {
          k.dx(side, Vec<T>::load(d + j), Vec<T>::load(x + j, left), to.at(c + j), left,
               !a.batch_statistics)
              .store(dx + at + j, left);
        });
      }
      if (S* out = static_cast<S*>(a.grad_residual)) {
        each_vector<T>(count, [&](int64_t j, auto left)
                                  BRAZE_LAMBDA { Vec<T>::load(d + j).store(out + at + j, left); });
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
                  const InputConstants<Arithmetic<S>>& constants) {
    using T = Arithmetic<S>;
    constexpr bool kPairs = kInPairs<S> && !kCase.mask;
    constexpr int kVecs = kPairs ? 2 : 1, kStep = kVecs * kWidth<T>;
    constexpr int kInputs = kCase.two ? 2 : 1;
    const InputConstants<T> k = constants;
    const int64_t column = to.at(-1);
    rows_at_once<2>(m, [&](auto count, int64_t e, int64_t stride, int64_t columns) {
      constexpr int kCount = decltype(count)::value;
      const Sources<S> from = sources_at<S>(a, e);
      const BitsOfRows<kCount> bits(a, e, stride, columns);
      S* const dx[2] = {static_cast<S*>(a.grad[0].dx) + e, static_cast<S*>(a.grad[1].dx) + e};
      S* const copy = a.grad_residual == nullptr ? nullptr : static_cast<S*>(a.grad_residual) + e;
      int64_t j = 0;
      for (; j + kStep <= columns; j += kStep) {
        const int64_t c = j & column;
        Group<kCase, kPairs, kVecs, S, T> group[kCount];
        unrolled<kCount>([&](auto r) BRAZE_LAMBDA { group[r].load(from, r * stride + j); });
        unrolled<kVecs>([&](auto v) BRAZE_LAMBDA {
          unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
            auto& g = group[r];
            g.differentiate(v, bits.at(r, j), c + v * kWidth<T>, k.k);
            unrolled<kInputs>([&](auto i) BRAZE_LAMBDA {
              g.x[i][v] = k.dx(i, g.d[v], g.x[i][v], c + v * kWidth<T>, Whole{}, kCase.frozen);
            });
          });
        });
        unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
          unrolled<kInputs>([&](auto i) BRAZE_LAMBDA {
            store_group<kPairs>(group[r].x[i], dx[i] + r * stride + j);
          });
          if (kCase.mask && copy != nullptr) store_group<kPairs>(group[r].d, copy + r * stride + j);
        });
      }
      for (int r = 0; j < columns && r < kCount; ++r) {
        row<S>(a, e + r * stride + j, columns - j, bits.at(r, j), j, to, constants);
      }
    });
  }
};

template <class S>
void apply_grad_of(const BackwardArgs& a, const Tiles& tiles, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const bool two = a.input[1].x != nullptr;
  // What the hot loops write: of one input, or of both, and d with a mask.
  const bool all = a.grad[0].dx != nullptr && two == (a.grad[1].dx != nullptr) &&
                   (a.mask != nullptr || a.grad_residual == nullptr);
  const auto loop = all ? loop_for<S, ApplyGrad>(a, !a.batch_statistics) : &ApplyGrad::any<S>;
  const bool in_pairs = kInPairs<S> && loop != &ApplyGrad::any<S> && a.mask == nullptr;
  const Spread to = {tiles.fold, tiles.span, tiles.one_channel, in_pairs};
  alignas(64) T columns[12][kMatrixColumns];
  InputConstants<T> k;
  for_each_matrix(
      tiles, begin, end, in_pairs ? kMatrixColumns : a.shape.c,
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
