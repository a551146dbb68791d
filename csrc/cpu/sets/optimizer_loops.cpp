// One loop serves every rule. Dense operands of the dtypes in kRows are read and written where they
// are; all else passes through tiles of the arithmetic type.
#include "../set_begin.h"
//
#include "../../math/gradient.h"
#include "../optimizer_loops.h"
#include "../simd.h"

namespace braze::cpu::BRAZE_SET {
namespace {

constexpr int64_t kTile = 512;
// Where the operands of a loop begin.
struct Arrays {
  void* param;
  const void* grad;
  void* state[kMaxStates];
};

template <class Rule, class T>
using Loop = void (*)(const Arrays&, int64_t n, const typename Rule::template Args<T>&);

// P is what param and grad hold, S what the states do.
template <class Rule, class T, uint32_t kFlags, class P, class S>
void loop(const Arrays& arrays, int64_t n, const typename Rule::template Args<T>& arguments) {
  // Short loops are all counting, and long ones run out of registers.
  constexpr bool kShort = Rule::kStates == 1 && !(kFlags & kPenalty);
  using V = std::conditional_t<sizeof(P) == 2 || kShort, Wide<T>, Vec<T>>;
  const typename Rule::template Args<T> a = arguments;
  P* const param = static_cast<P*>(arrays.param);
  const P* const grad = static_cast<const P*>(arrays.grad);
  S* const state[] = {static_cast<S*>(arrays.state[0]), static_cast<S*>(arrays.state[1]),
                      static_cast<S*>(arrays.state[2])};
  const auto load = [](const auto* from, auto count) BRAZE_LAMBDA {
    return std::is_same_v<P, S> ? V::load_in_any_order(from, count) : V::load(from, count);
  };
  const auto store = [](const V& value, auto* to, auto count) BRAZE_LAMBDA {
    std::is_same_v<P, S> ? value.store_in_any_order(to, count) : value.store(to, count);
  };
  const auto update = [&]<size_t... k>(int64_t i, auto count,
                                       std::index_sequence<k...>) BRAZE_LAMBDA {
    if (sizeof(P) == 2 && Rule::kStates > 1 && Rule::uses(kFlags, 1)) {
      constexpr int64_t kAhead = 512;  // conversions keep the core too busy to look ahead itself
      __builtin_prefetch(param + i + kAhead, 1);
      __builtin_prefetch(grad + i + kAhead);
      ((Rule::uses(kFlags, k) ? __builtin_prefetch(state[k] + i + kAhead, 1) : void()), ...);
    }
    V p(0), g = load(grad + i, count);
    if constexpr (Rule::kUpdatesParam) p = load(param + i, count);
    // A state that is overwritten is never read: it may hold anything.
    const bool reads = !(kFlags & kFirst);
    V s[] = {reads && Rule::uses(kFlags, k) ? load(state[k] + i, count) : V(0)...};
    update_element<Rule>(p, g, s, a, kFlags);
    if constexpr (Rule::kUpdatesParam) store(p, param + i, count);
    ((Rule::uses(kFlags, k) ? store(s[k], state[k] + i, count) : void()), ...);
  };
  constexpr std::make_index_sequence<Rule::kStates> states;
  int64_t i = 0;
  if constexpr (BRAZE_LEVEL > 0) {  // else not worth its size
    for (const int64_t whole = n / V::kLanes * V::kLanes; i < whole; i += V::kLanes) {
      update(i, Whole{}, states);
    }
  }
  for (; i < n; i += V::kLanes) update(i, n - i, states);
}

template <class Rule>
constexpr bool occurs(uint32_t flags) {
  const uint32_t known =
      Rule::kFlags | (Rule::kUpdatesParam ? kPenalty : 0u) | (Rule::kFirstOverwrites ? kFirst : 0u);
  return (flags & ~known) == 0 && Rule::occurs(flags);
}

// [flags]
template <class Rule, class T, class P, class S>
constexpr auto kLoops = []<uint32_t... kFlags>(std::integer_sequence<uint32_t, kFlags...>) {
  return std::array{[] {
    Loop<Rule, T> result = nullptr;
    if constexpr (occurs<Rule>(kFlags)) result = loop<Rule, T, kFlags, P, S>;
    return result;
  }()...};
}(std::make_integer_sequence<uint32_t, kAllFlags>{});

// For what param, grad and states hold; null if there is none of its own.
template <class Rule, class T>
Loop<Rule, T> loop_for(uint32_t flags, DType param, DType state) {
  const auto is = [=](DType p, DType s) { return param == p && state == s; };
  if (is(kDTypeOf<T>, kDTypeOf<T>)) return kLoops<Rule, T, T, T>[flags];
  if constexpr (BRAZE_LEVEL > 0 && std::is_same_v<T, float>) {
    if (is(DType::bf16, DType::bf16)) return kLoops<Rule, T, Bf16, Bf16>[flags];
    if (is(DType::bf16, DType::f32)) return kLoops<Rule, T, Bf16, T>[flags];
    if (is(DType::f16, DType::f16)) return kLoops<Rule, T, F16, F16>[flags];
    if (is(DType::f16, DType::f32)) return kLoops<Rule, T, F16, T>[flags];
  }
  return nullptr;
}

// The same for a tensor's own memory; null if there is none.
template <class Rule, class T>
Loop<Rule, T> loop_for(const TensorWork& t, uint32_t flags) {
  if (!t.linear || t.grad.data == nullptr || t.sum.data != nullptr) return nullptr;
  if (Rule::kUpdatesParam && t.param.dtype != t.grad.dtype) return nullptr;
  DType state = t.grad.dtype;  // of a rule without states
  for (int k = Rule::kStates - 1; k >= 0; --k) {
    if (Rule::uses(flags, k)) state = t.state[k].dtype;
  }
  for (int k = 0; k < Rule::kStates; ++k) {
    if (Rule::uses(flags, k) && t.state[k].dtype != state) return nullptr;
  }
  return loop_for<Rule, T>(flags, t.grad.dtype, state);
}

template <class Rule, class T>
bool run_in_place(const TensorWork& t, int64_t begin, int64_t end, uint32_t flags,
                  const typename Rule::template Args<T>& a) {
  const Loop<Rule, T> loop = loop_for<Rule, T>(t, flags);
  if (loop == nullptr) return false;
  const auto at = [=](const Operand& operand) BRAZE_LAMBDA {
    return with_dtype(operand.dtype, [&](auto element) BRAZE_LAMBDA -> void* {
      return static_cast<decltype(element)*>(operand.data) + begin;
    });
  };
  loop({at(t.param), at(t.grad), {at(t.state[0]), at(t.state[1]), at(t.state[2])}}, end - begin, a);
  return true;
}

// body(offset, length) for each run along the innermost dimension in elements [begin, begin + n) of
// a strided operand.
template <class Body>
BRAZE_INLINE void each_run(const TensorWork& t, const int64_t* strides, int64_t begin, int64_t n,
                           const Body& body) {
  if (t.ndim == 0) return body(0, n);
  int64_t index[kMaxDims], offset = 0;
  for (int d = t.ndim - 1; d >= 0; --d) {
    index[d] = begin % t.sizes[d];
    begin /= t.sizes[d];
    offset += index[d] * strides[d];
  }
  while (n > 0) {
    int d = t.ndim - 1;
    const int64_t length = std::min(n, t.sizes[d] - index[d]);
    body(offset, length);
    n -= length;
    offset += length * strides[d];
    index[d] += length;
    for (; d > 0 && index[d] == t.sizes[d]; --d) {
      offset += strides[d - 1] - index[d] * strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <class S>
BRAZE_INLINE void copy_run(const S* from, int64_t from_stride, S* to, int64_t to_stride,
                           int64_t n) {
  if (from_stride == 1 && to_stride == 1) {
    memcpy(to, from, static_cast<size_t>(n) * sizeof(S));
    return;
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
}

template <class S>
void gather(const TensorWork& t, const Operand& operand, int64_t begin, int64_t n, S* out) {
  const S* const memory = static_cast<const S*>(operand.data);
  const int64_t stride = t.ndim == 0 ? 1 : operand.strides[t.ndim - 1];
  each_run(t, operand.strides, begin, n, [&](int64_t offset, int64_t length) BRAZE_LAMBDA {
    copy_run(memory + offset, stride, out, 1, length);
    out += length;
  });
}

template <class S>
void scatter(const TensorWork& t, const Operand& operand, int64_t begin, int64_t n, const S* in) {
  S* const memory = static_cast<S*>(operand.data);
  const int64_t stride = t.ndim == 0 ? 1 : operand.strides[t.ndim - 1];
  each_run(t, operand.strides, begin, n, [&](int64_t offset, int64_t length) BRAZE_LAMBDA {
    copy_run(in, 1, memory + offset, stride, length);
    in += length;
  });
}

// T: what a tile has; the other is memory.
template <class T, class From, class To>
void convert(const From* from, To* to, int64_t n) {
  using V = Wide<T>;
  each_vector<V>(n, [=](int64_t i, auto count)
                        BRAZE_LAMBDA { V::load(from + i, count).store(to + i, count); });
}

// One operand's elements [begin, begin + n), n <= kTile, as an array of T: in place where
// memory holds that, else in a tile.
template <class T>
class View {
 public:
  // read: the old values are needed; zeros where there are none.
  T* open(const TensorWork& t, const Operand& operand, int64_t begin, int64_t n, bool read) {
    in_place_ = t.linear && operand.dtype == kDTypeOf<T> && operand.data != nullptr;
    if (in_place_) return static_cast<T*>(operand.data) + begin;
    if (!read) return tile_;
    if (operand.data == nullptr) {
      std::fill_n(tile_, kTile, T(0));
      return tile_;
    }
    with_dtype(operand.dtype, [&](auto element) {
      using S = decltype(element);
      const S* const memory = static_cast<const S*>(operand.data);
      if (t.linear) return convert<T>(memory + begin, tile_, n);
      S packed[kTile];
      gather(t, operand, begin, n, packed);
      convert<T>(packed, tile_, n);
    });
    return tile_;
  }
  void close(const TensorWork& t, const Operand& operand, int64_t begin, int64_t n) {
    if (in_place_) return;
    with_dtype(operand.dtype, [&](auto element) {
      using S = decltype(element);
      S* const memory = static_cast<S*>(operand.data);
      if (t.linear) return convert<T>(tile_, memory + begin, n);
      S packed[kTile];
      convert<T>(tile_, packed, n);
      scatter(t, operand, begin, n, packed);
    });
  }

 private:
  bool in_place_ = false;
  alignas(64) T tile_[kTile];
};

// The gradient to apply: grad, the accumulator, or accumulator + weight * grad.
template <class T>
const T* open_gradient(const TensorWork& t, View<T>& grad, View<T>& sum, T* out, int64_t begin,
                       int64_t n, T weight) {
  if (t.sum.data == nullptr) return grad.open(t, t.grad, begin, n, true);
  const T* s = sum.open(t, t.sum, begin, n, true);
  if (t.grad.data == nullptr) return s;
  const T* g = grad.open(t, t.grad, begin, n, true);
  using V = Vec<T>;
  for (int64_t i = 0; i < n; i += V::kLanes) {
    accumulate_gradient(V::load(s + i, n - i), V::load(g + i, n - i), weight, T(1), false)
        .store(out + i);
  }
  return out;
}

template <class Rule, class T>
void run_tiles(const TensorWork& t, int64_t begin, int64_t end, uint32_t flags,
               const typename Rule::template Args<T>& a) {
  const Loop<Rule, T> loop = loop_for<Rule, T>(flags, kDTypeOf<T>, kDTypeOf<T>);
  View<T> param, grad, sum, state[Rule::kStates];
  alignas(64) T joined[kTile];
  for (; begin < end; begin += kTile) {
    const int64_t n = std::min(kTile, end - begin);
    Arrays arrays = {};
    T weight(1);
    if constexpr (Rule::kUpdatesParam) weight = a.fold_weight;
    arrays.grad = open_gradient(t, grad, sum, joined, begin, n, weight);
    if (Rule::kUpdatesParam) arrays.param = param.open(t, t.param, begin, n, true);
    for (int k = 0; k < Rule::kStates; ++k) {
      if (!Rule::uses(flags, k)) continue;
      arrays.state[k] = state[k].open(t, t.state[k], begin, n, !(flags & kFirst));
    }
    loop(arrays, n, a);
    if (Rule::kUpdatesParam) param.close(t, t.param, begin, n);
    for (int k = 0; k < Rule::kStates; ++k) {
      if (Rule::uses(flags, k)) state[k].close(t, t.state[k], begin, n);
    }
  }
}

template <class Rule, class T>
void run(const TensorWork& t, int64_t begin, int64_t end, uint32_t flags,
         const typename Rule::template Args<T>& a) {
  if (!run_in_place<Rule, T>(t, begin, end, flags, a)) {
    run_tiles<Rule, T>(t, begin, end, flags, a);
  }
}

// --- what goes with an update, and what comes before it ---

// Sums in 16 lanes, element i of a stretch in lane i mod 16, whatever the instruction set: so they
// have the same bits in each.
using V16 = Lanes<double, 16>;

template <class V>
auto total(const V& lanes) {
  alignas(64) typename V::Element value[V::kLanes];
  lanes.store(value);
  for (int width = V::kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) value[i] += value[i + width];
  }
  return value[0];
}

// The same for what need not be as exact, in the arithmetic of S.
template <class S>
using Own16 = Lanes<std::conditional_t<sizeof(S) == 8, double, float>, 16>;

// visit(g, n) for the gradients as they are measured, a stretch at a time.
template <class T, class Visit>
void each_stretch(const TensorWork& t, int64_t begin, int64_t end, double weight,
                  const Visit& visit) {
  if (t.linear && t.sum.data == nullptr) {
    with_dtype(t.grad.dtype, [&](auto element) {
      visit(static_cast<const decltype(element)*>(t.grad.data) + begin, end - begin);
    });
    return;
  }
  View<T> grad, sum;
  alignas(64) T joined[kTile];
  for (; begin < end; begin += kTile) {
    const int64_t n = std::min(kTile, end - begin);
    visit(open_gradient(t, grad, sum, joined, begin, n, static_cast<T>(weight)), n);
  }
}

template <class S>
void add_squares(V16& sum, const S* p, int64_t n) {
  V16 squares = sum;  // a copy can stay in registers
  each_vector<V16>(n, [&](int64_t i, auto count) BRAZE_LAMBDA {
    const V16 g = V16::load(p + i, count);
    squares += g * g;
  });
  sum = squares;
}

template <class S>
void add_magnitudes(GradientSums& sums, const S* p, int64_t n) {
  using V = Own16<S>;
  V largest(0);
  typename V::Mask zeros(0);
  each_vector<V>(n, [&](int64_t i, auto count) BRAZE_LAMBDA {
    const V g = V::load(p + i, count);
    largest = larger(larger(g, -g), largest);
    zeros = zeros - (g == V(0));
  });
  alignas(64) typename V::Element magnitudes[V::kLanes];
  largest.store(magnitudes);
  for (const auto magnitude : magnitudes) {
    sums.largest = std::max<double>(sums.largest, magnitude);
  }
  // Lanes without an element look like zeros.
  sums.zeros += total(zeros) - (V::kLanes - n % V::kLanes) % V::kLanes;
}

template <class T>
void measure_as(const TensorWork& t, int64_t begin, int64_t end, double weight, bool all,
                GradientSums& sums) {
  V16 squares(0);
  each_stretch<T>(t, begin, end, weight, [&](const auto* g, int64_t n) {
    add_squares(squares, g, n);
    if (all) add_magnitudes(sums, g, n);
  });
  sums.squares = total(squares);
  if (!all || sums.squares < HUGE_VAL) return;
  each_stretch<T>(t, begin, end, weight, [&](const auto* g, int64_t n) {
    using V = Own16<std::remove_cvref_t<decltype(*g)>>;
    for (int64_t i = 0; i < n; i += V::kLanes) {
      const V value = V::load(g + i, n - i);
      const typename V::Mask non_finite = !(larger(value, -value) < V(HUGE_VAL));
      sums.non_finite += __builtin_popcount(non_finite.bits());
    }
  });
}

void measure(const TensorWork& t, int64_t begin, int64_t end, double weight, bool all,
             GradientSums& sums) {
  sums = {};
  t.is_double ? measure_as<double>(t, begin, end, weight, all, sums)
              : measure_as<float>(t, begin, end, weight, all, sums);
  if (t.sum.data != nullptr) return;  // the weight is in already
  sums.squares *= weight * weight;
  sums.largest *= weight;
}

// An update, a tile at a time, and while the tile is in the cache, what depends on the parameter
// that it made.
template <class Rule, class T>
void run_and_follow(const TensorWork& t, int64_t begin, int64_t end, uint32_t flags,
                    const typename Rule::template Args<T>& a, T average_weight,
                    GradientSums* sums) {
  using V = Vec<T>;
  View<T> param, average;
  using Own = Own16<T>;
  alignas(64) T old[kTile];
  V16 changes(0), sizes(0);
  for (; begin < end; begin += kTile) {
    const int64_t n = std::min(kTile, end - begin);
    if (sums != nullptr) std::copy_n(param.open(t, t.param, begin, n, true), n, old);
    run<Rule, T>(t, begin, begin + n, flags, a);
    const T* const p = param.open(t, t.param, begin, n, true);
    if (sums != nullptr) {
      Own change(0), size(0);  // of few enough elements for their own arithmetic
      each_vector<Own>(n, [&](int64_t i, auto count) BRAZE_LAMBDA {
        const Own before = Own::load(old + i, count), step = Own::load(p + i, count) - before;
        change += step * step;
        size += before * before;
      });
      alignas(64) T parts[2][Own::kLanes];
      change.store(parts[0]);
      size.store(parts[1]);
      changes += V16::load(parts[0]);
      sizes += V16::load(parts[1]);
    }
    if (t.average.data == nullptr) continue;
    T* const mean = average.open(t, t.average, begin, n, !t.first_average);
    each_vector<V>(n, [&](int64_t i, auto count) BRAZE_LAMBDA {
      const V now = V::load(p + i, count);
      const V next =
          t.first_average ? now : average_with(V::load(mean + i, count), now, average_weight);
      next.store(mean + i, count);
    });
    average.close(t, t.average, begin, n);
  }
  if (sums == nullptr) return;
  sums->update_squares = total(changes);
  sums->param_squares = total(sizes);
}

// hypers.data: Hyper<Rule>[].
template <class Rule>
void update(const TensorWork& t, int64_t begin, int64_t end, const Hypers& hypers,
            GradientSums* sums) {
  const Hyper<Rule>& h = static_cast<const Hyper<Rule>*>(hypers.data)[t.hyper];
  const uint32_t flags =
      h.flags | (Rule::kFirstOverwrites && t.first && Rule::uses(h.flags, 0) ? kFirst : 0u);
  const auto run_as = [&]<class T>(const typename Rule::template Args<T>& a, T average_weight) {
    if constexpr (Rule::kIsOptimizer) {
      if (t.average.data != nullptr || sums != nullptr) {
        return run_and_follow<Rule, T>(t, begin, end, flags, a, average_weight, sums);
      }
    }
    run<Rule, T>(t, begin, end, flags, a);
  };
  if (t.is_double) {
    run_as(h.d, hypers.average_weight);
  } else {
    run_as(h.f, static_cast<float>(hypers.average_weight));
  }
}

template <class... Rule>
constexpr OptimizerLoops all(RuleList<Rule...>) {
  return {{update<Rule>...}, measure};
}

}  // namespace

extern const OptimizerLoops optimizer_loops = all(Rules{});

}  // namespace braze::cpu::BRAZE_SET
#include "../set_end.h"
