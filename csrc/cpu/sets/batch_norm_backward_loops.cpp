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

// What d is made of, from some element on. dy2 may be null.
template <class S>
struct Sources : Summands<S> {
  const S *dy, *dy2;
};

template <class S>
Sources<S> sources_at(const BackwardArgs& a, int64_t e) {
  return {summands_at<S>(a, e), moved<S>(a.dy, e), moved<S>(a.dy2, e)};
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

// What a vector of a hot case is made of.
template <GradientCase kCase, class V, class S>
struct Loaded {
  static constexpr bool kNeedsZ = kCase.activation != Activation::identity && !kCase.mask;
  static constexpr int kInputs = kCase.two ? 2 : 1;
  V d, x[kInputs], residual;

  // dy + dy2 and the other tensors.
  BRAZE_INLINE void load(const Sources<S>& from, int64_t j) {
    d = V::load_in_any_order(from.dy + j);
    if constexpr (kCase.second) {
      d += V::load_in_any_order(from.dy2 + j);
      if constexpr (sizeof(S) == 2) {
        S sum[V::kLanes];
        d.store_in_any_order(sum);
        d = V::load_in_any_order(sum);
      }
    }
    if constexpr (kNeedsZ || !kCase.frozen) {
      unrolled<kInputs>([&](auto i) BRAZE_LAMBDA { x[i] = V::load_in_any_order(from.x[i] + j); });
    }
    if constexpr (kCase.residual) residual = V::load_in_any_order(from.residual + j);
  }
  // d, whose constants are from column c. bits: those of the vector.
  template <class T>
  BRAZE_INLINE void differentiate(const uint8_t* bits, int64_t c, const Constants<T>* k) {
    if constexpr (kCase.mask) {
      d = two_slope_gradient(d, V::Mask::from_bits(load_bits<V>(bits)), 1, 0);
    } else if constexpr (kNeedsZ) {
      V z = k[0].z(x[0], c, Whole{});
      if constexpr (kCase.two) z += k[1].z(x[1], c, Whole{});
      if constexpr (kCase.residual) z += residual;
      d = by_register(
          [](const auto& dy, const auto& at)
              BRAZE_LAMBDA { return activation_gradient<kCase.activation>(dy, at, T(0)); },
          d, z);
    }
  }
};

// d of n <= kPiece elements from e in any case.
template <class S, class T>
void gradient_any(const BackwardArgs& a, int64_t e, int64_t n, const uint8_t* bits, int64_t column,
                  const Spread& to, const Constants<T>* k, T* d) {
  const Sources<S> from = sources_at<S>(a, e);
  each_vector<Vec<T>>(n, [&](int64_t j, auto left)
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
  each_vector<Vec<T>>(n, [&](int64_t j, auto left)
                             BRAZE_LAMBDA { from.z(j, to.at(column + j), left, k).store(z + j); });
  activations.of<T>().gradient[static_cast<int>(a.activation)](d, z, n, parameter);
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
    Cases<GradientCase{}, GradientCase{.activation = Activation::relu}, GradientCase{.mask = true},
          GradientCase{.two = true}, GradientCase{.activation = Activation::relu, .two = true}>;
using HotFloatGradients =  // of all but fp64
    Cases<GradientCase{.activation = Activation::relu6},
          GradientCase{.activation = Activation::hardswish},
          GradientCase{.activation = Activation::silu},
          GradientCase{.activation = Activation::silu, .residual = true},
          GradientCase{.mask = true, .second = true},
          GradientCase{.activation = Activation::relu, .two = true, .second = true},
          GradientCase{.frozen = true},
          GradientCase{.activation = Activation::relu, .frozen = true}>;

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
  if constexpr (sizeof(S) < 8) HotFloatGradients::choose<S, Loops>(is, loop);
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
        each_vector<Vec<T>>(count, [&](int64_t j, auto left) BRAZE_LAMBDA {
          Vec<T>::load(d[r] + j).store(kept + at + j, left);
        });
      }
      each_vector<Vec<T>>(count, [&](int64_t j, auto left) BRAZE_LAMBDA {
        // A plane's sums are carried on, those of rows are formed apart and added.
        const int64_t at = (c + j) & wrap;
        const auto begin_sum = [&](const T* sum) BRAZE_LAMBDA {
          return to.one_channel ? Vec<T>::load(sum + at, left) : Vec<T>(0);
        };
        const auto end_sum = [&](const Vec<T>& value, T* sum) BRAZE_LAMBDA {
          to.one_channel ? value.store(sum + at, left) : add_to(sum + at, value, left);
        };
        Vec<T> grad = begin_sum(sums.grad);
        for (int r = 0; r < kCount; ++r) grad += Vec<T>::load(d[r] + j);
        end_sum(grad, sums.grad);
        for (int side = 0; side < 1 + two; ++side) {
          Vec<T> unused = 0, input = begin_sum(sums.input[side]);
          const Vec<T> mean = Vec<T>::load(k[side].mean + to.at(c + j), left);
          const S* x = static_cast<const S*>(a.input[side].x) + e + begin + j;
          for (int r = 0; r < kCount; ++r) {
            add_gradient(Vec<T>::load(d[r] + j), Vec<T>::load(x + r * stride, left), mean, unused,
                         input);
          }
          end_sum(input, sums.input[side]);
        }
      });
    }
  }

  template <class S>
  static void any(const BackwardArgs& a, const Matrix& m, const Spread& to,
                  const Constants<Arithmetic<S>>* k, Sums<Arithmetic<S>>& sums, S* kept) {
    rows_at_once<kGradientRows>(m, [&](auto count, int64_t e, int64_t stride) {
      constexpr int kCount = decltype(count)::value;
      const BitsOfRows<kCount> bits(a, e, stride, m.columns);
      rows<kCount>(a, e, stride, m.columns, bits, 0, to, k, sums, kept);
    });
  }

  template <class S, GradientCase kCase>
  static void hot(const BackwardArgs& a, const Matrix& m, const Spread& to,
                  const Constants<Arithmetic<S>>* k, Sums<Arithmetic<S>>& sums, S* kept) {
    if (to.one_channel) {
      hot_rows<S, kCase, 1, true>(a, m.offset, 0, m.columns, to, k, sums, kept);
      return;
    }
    rows_at_once<kGradientRows>(m, [&](auto count, int64_t e, int64_t stride) {
      hot_rows<S, kCase, decltype(count)::value, false>(a, e, stride, m.columns, to, k, sums, kept);
    });
  }

  // The sums of kVecs vectors, in registers.
  template <int kInputs, int kVecs, class V>
  struct InRegisters {
    V grad[kVecs], input[kInputs][kVecs];

    // body(sum, where memory has it).
    template <class T, class Body>
    BRAZE_INLINE void each(Sums<T>& sums, int64_t j, const Body& body) {
      unrolled<kVecs>([&](auto v) BRAZE_LAMBDA {
        body(grad[v], sums.grad + j + v * V::kLanes);
        unrolled<kInputs>(
            [&](auto i) BRAZE_LAMBDA { body(input[i][v], sums.input[i] + j + v * V::kLanes); });
      });
    }
    template <class T, GradientCase kCase, class S>
    BRAZE_INLINE void add(int v, const Loaded<kCase, V, S>& from, const Constants<T>* k,
                          int64_t c) {
      unrolled<kInputs>([&](auto i) BRAZE_LAMBDA {
        V unused = 0;
        add_gradient(from.d, from.x[i], V::load(k[i].mean + c), i == 0 ? grad[v] : unused,
                     input[i][v]);
      });
    }
  };

  // kPlane: all columns are one channel's, and have kPlaneSums sums.
  template <class S, GradientCase kCase, int kCount, bool kPlane>
  static void hot_rows(const BackwardArgs& a, int64_t e, int64_t stride, int64_t columns,
                       const Spread& to, const Constants<Arithmetic<S>>* constants,
                       Sums<Arithmetic<S>>& sums, S* kept) {
    using T = Arithmetic<S>;
    using V = HotVec<S, kCase.mask>;
    constexpr int kVecs = kPlane ? kPlaneSums / V::kLanes : 1, kInputs = kCase.two ? 2 : 1;
    constexpr int64_t kStep = kVecs * V::kLanes;
    // Where d is mostly kept, it is stored after all loads: one whose address agrees in its last 12
    // bits waits for the store. Elsewhere registers are better spent.
    constexpr bool kKeepsLast = kCase.mask || kCase.two || kCase.second;
    constexpr bool kKeeps = kKeepsLast || kCase.activation == Activation::silu;
    const auto load = [](auto& sum, const T* at)
                          BRAZE_LAMBDA { sum = std::remove_cvref_t<decltype(sum)>::load(at); };
    const auto store = [](const auto& sum, T* at) BRAZE_LAMBDA { sum.store(at); };
    const auto clear = [](auto& sum, const T*) BRAZE_LAMBDA { sum = 0; };
    const auto add = [](const auto& sum, T* at) BRAZE_LAMBDA { add_to(at, sum, Whole{}); };
    const Constants<T> k[2] = {constants[0], constants[1]};
    const Sources<S> from = sources_at<S>(a, e);
    const BitsOfRows<kCount> bits(a, e, stride, columns);
    S* const keep = kept == nullptr ? nullptr : kept + e;
    InRegisters<kInputs, kVecs, V> own;
    const auto reorder = [&](auto to_pairs) BRAZE_LAMBDA {
      if constexpr (V::template kInPairs<S>) {
        constexpr bool kTo = decltype(to_pairs)::value;
        reorder_pairs<kTo>(sums.grad, kPlaneSums);
        for (int i = 0; i < kInputs; ++i) reorder_pairs<kTo>(sums.input[i], kPlaneSums);
      }
    };
    if constexpr (kPlane) {
      reorder(std::true_type{});
      own.each(sums, 0, load);
    }
    int64_t j = 0;
    for (; j + kStep <= columns; j += kStep) {
      if constexpr (!kPlane) own.each(sums, j, clear);
      Loaded<kCase, V, S> loaded[kCount][kVecs];
      const auto each = [&](const auto& body) BRAZE_LAMBDA {
        unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
          unrolled<kVecs>([&](auto v)
                              BRAZE_LAMBDA { body(loaded[r][v], r, v, j + v * V::kLanes); });
        });
      };
      each([&](auto& vector, auto r, auto v, int64_t column) BRAZE_LAMBDA {
        const int64_t c = kPlane ? 0 : column;
        vector.load(from, r * stride + column);
        vector.differentiate(bits.at(r, column), c, k);
        own.add(v, vector, k, c);
        if (kKeeps && !kKeepsLast && keep != nullptr) {
          vector.d.store_in_any_order(keep + r * stride + column);
        }
      });
      if (kKeepsLast && keep != nullptr) {
        each([&](const auto& vector, auto r, auto, int64_t column)
                 BRAZE_LAMBDA { vector.d.store_in_any_order(keep + r * stride + column); });
      }
      if constexpr (!kPlane) own.each(sums, j, add);
    }
    if constexpr (kPlane) {
      own.each(sums, 0, store);
      reorder(std::false_type{});
    }
    for (; j + kWidth<T> <= columns; j += kWidth<T>) {  // too few for a step
      InRegisters<kInputs, 1, Vec<T>> rest;
      const int64_t c = kPlane ? 0 : j, at = kPlane ? j % kPlaneSums : j;
      kPlane ? rest.each(sums, at, load) : rest.each(sums, at, clear);
      unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
        Loaded<kCase, Vec<T>, S> vector;
        vector.load(from, r * stride + j);
        vector.differentiate(bits.at(r, j), c, k);
        rest.add(0, vector, k, c);
        if (kKeeps && keep != nullptr) vector.d.store(keep + r * stride + j);
      });
      kPlane ? rest.each(sums, at, store) : rest.each(sums, at, add);
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
  const Spread to = {g.fold, g.span, g.one_channel,
                     kPairs<S> && loop != &Reduce::any<S> && a.mask == nullptr};
  alignas(64) T columns[6][kMatrixColumns];
  alignas(64) double block[kMatrixColumns];
  Sums<T> sums;
  T* const rows[] = {sums.grad, sums.input[0], sums.input[1]};
  Constants<T> k[2];
  for (int64_t u = begin; u < end; ++u) {
    const int64_t part = u / g.slabs, column = u % g.slabs;
    const int64_t first = g.first_channel(column), width = g.last_channel(column) - first;
    const auto set = [&](const Spread& spread) {
      for (int i = 0; i < 2; ++i) {
        k[i].set(a.input[i].stats, a.shape.c, first, width, spread, columns + 3 * i);
      }
    };
    set(to);
    double* const into = parts + part * kPartRows * g.row() + first;
    for (int s = 0; s < used; ++s) std::fill_n(into + s * g.row(), width, 0.0);
    for (int64_t b = g.first_block(part); b < g.first_block(part + 1); ++b) {
      const Matrix m = g.matrix(column, b);
      const int64_t count = g.one_channel ? kPlaneSums : std::max(m.columns, m.tail);
      for (int s = 0; s < used; ++s) std::fill_n(rows[s], count, T(0));
      Matrix image = m;
      for (int64_t i = g.images(b); i > 0; --i, image.offset += g.image_stride()) {
        loop(a, image, to, k, sums, kept);
      }
      for (int s = 0; to.in_pairs && !to.one_channel && s < used; ++s) {
        reorder_pairs<false>(rows[s], m.columns);
      }
      if (m.tail > 0) {  // only the last block has one
        set(to.in_order());
        const int64_t e = m.offset + m.rows * m.stride;
        Reduce::rows<1>(a, e, 0, m.tail, BitsOfRows<1>(a, e, 0, m.tail), 0, to.in_order(), k, sums,
                        kept);
      }
      for (int s = 0; s < used; ++s) {
        fold_columns(rows[s], count, width, g.column_span(), block);
        each_vector<Doubles>(width, [&](int64_t j, auto n) {
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
  template <class V, class N>
  BRAZE_INLINE V dx(int side, const V& d, const V& x, int64_t c, N n, bool frozen) const {
    const V on_grad = V::load(f[side].on_grad + c, n);
    if (frozen) return input_gradient(d, on_grad);
    return input_gradient(d, x, V::load(k[side].mean + c, n), on_grad,
                          V::load(f[side].on_input + c, n), V::load(f[side].constant + c, n));
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
        each_vector<Vec<T>>(count, [&](int64_t j, auto left) BRAZE_LAMBDA {
          k.dx(side, Vec<T>::load(d + j), Vec<T>::load(x + j, left), to.at(c + j), left,
               !a.batch_statistics)
              .store(dx + at + j, left);
        });
      }
      if (S* out = static_cast<S*>(a.grad_residual)) {
        each_vector<Vec<T>>(count, [&](int64_t j, auto left) BRAZE_LAMBDA {
          Vec<T>::load(d + j).store(out + at + j, left);
        });
      }
    }
  }

  template <class S>
  static void any(const BackwardArgs& a, const Matrix& m, const Spread& to,
                  const InputConstants<Arithmetic<S>>& k) {
    rows_at_once<1>(m, [&](auto, int64_t e, int64_t stride) {
      row<S>(a, e, m.columns, BitsOfRows<1>(a, e, stride, m.columns).row[0], 0, to, k);
    });
  }

  template <class S, GradientCase kCase>
  static void hot(const BackwardArgs& a, const Matrix& m, const Spread& to,
                  const InputConstants<Arithmetic<S>>& constants) {
    using T = Arithmetic<S>;
    using V = HotVec<S, kCase.mask>;
    constexpr int kInputs = kCase.two ? 2 : 1;
    const InputConstants<T> k = constants;
    const int64_t column = to.at(-1), columns = m.columns;
    rows_at_once<2>(m, [&](auto count, int64_t e, int64_t stride) {
      constexpr int kCount = decltype(count)::value;
      const Sources<S> from = sources_at<S>(a, e);
      const BitsOfRows<kCount> bits(a, e, stride, columns);
      S* const dx[2] = {static_cast<S*>(a.grad[0].dx) + e, static_cast<S*>(a.grad[1].dx) + e};
      S* const copy = a.grad_residual == nullptr ? nullptr : static_cast<S*>(a.grad_residual) + e;
      int64_t j = 0;
      for (; j + V::kLanes <= columns; j += V::kLanes) {
        const int64_t c = j & column;
        Loaded<kCase, V, S> loaded[kCount];
        unrolled<kCount>([&](auto r) BRAZE_LAMBDA { loaded[r].load(from, r * stride + j); });
        unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
          auto& vector = loaded[r];
          vector.differentiate(bits.at(r, j), c, k.k);
          unrolled<kInputs>([&](auto i) BRAZE_LAMBDA {
            vector.x[i] = k.dx(i, vector.d, vector.x[i], c, Whole{}, kCase.frozen);
          });
        });
        unrolled<kCount>([&](auto r) BRAZE_LAMBDA {
          unrolled<kInputs>([&](auto i) BRAZE_LAMBDA {
            loaded[r].x[i].store_in_any_order(dx[i] + r * stride + j);
          });
          if (kCase.mask && copy != nullptr) loaded[r].d.store(copy + r * stride + j);
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
  const Spread to = {tiles.fold, tiles.span, tiles.one_channel,
                     kPairs<S> && loop != &ApplyGrad::any<S> && a.mask == nullptr};
  alignas(64) T columns[12][kMatrixColumns];
  InputConstants<T> k;
  for_each_matrix(
      tiles, to, begin, end,
      [&](int64_t first, int64_t width, const Spread& spread) {
        for (int i = 0; i < 2; ++i) {
          k.k[i].set(a.input[i].stats, a.shape.c, first, width, spread, columns + 6 * i);
          k.f[i].set(a.grad[i].coefficients, a.shape.c, first, width, spread, columns + 6 * i + 3);
        }
      },
      [&](const Matrix& m) { loop(a, m, to, k); },
      [&](int64_t e, int64_t n) {
        ApplyGrad::row<S>(a, e, n, BitsOfRows<1>(a, e, 0, n).row[0], 0, to.in_order(), k);
      });
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
