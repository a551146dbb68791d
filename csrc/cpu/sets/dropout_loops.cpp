#include "../set_begin.h"
//
#include "../activation_loops.h"
#include "../dropout_loops.h"
#include "../simd.h"

namespace braze::cpu::BRAZE_SET {
namespace {

// Two registers of counters for philox4x32: their chains of operations overlap.
struct Counters {
  static constexpr int kOne = kRegister / sizeof(uint64_t), kCount = 2 * kOne;
  using Word = Lanes<uint64_t, kCount>;
  static BRAZE_INLINE Word multiply(uint32_t constant, const Word& word) {
    return multiply_low(Word(constant), word);
  }
  static BRAZE_INLINE Word mix(const Word& product, const Word& word, uint32_t key) {
    return (product >> Word(32)) ^ word ^ Word(key);
  }
  // In each register, counters 0 4 1 5 2 6 3 7, or as many as there are: store() is then one step.
  static BRAZE_INLINE Word count_from(uint32_t first) {
    const auto from = [](uint32_t start) BRAZE_LAMBDA {
      return reg::by_lane<Register<uint64_t, kOne>>(
          [=](size_t i) BRAZE_LAMBDA { return start + i / 2 + i % 2 * (kOne / 2); });
    };
    return Word(Word::Half(from(first), {}), Word::Half(from(first + kOne), {}));
  }
  // The words in the order of counters.
  static BRAZE_INLINE void store(const Word (&c)[4], uint16_t* out) {
    store(c[0].lo.lo, c[1].lo.lo, c[2].lo.lo, c[3].lo.lo, out);
    store(c[0].hi.lo, c[1].hi.lo, c[2].hi.lo, c[3].hi.lo, out + kOne * kLanesPerBlock);
  }

 private:
  using R = Register<uint64_t, kOne>;
  static BRAZE_INLINE void store(R c0, R c1, R c2, R c3, uint16_t* out) {
    [=]<size_t... i>(std::index_sequence<i...>) BRAZE_LAMBDA {
      const R pair01 = low_halves(c0, c1), pair23 = low_halves(c2, c3);
      using InMemory = typename RegisterOf<uint64_t, kOne>::InMemory;
      InMemory* const to = reinterpret_cast<InMemory*>(out);
      to[0] = __builtin_shufflevector(pair01, pair23, (i % 2 == 0 ? i : kOne + i - 1)...);
      to[1] = __builtin_shufflevector(pair01, pair23, (i % 2 == 0 ? i + 1 : kOne + i)...);
    }(std::make_index_sequence<kOne>{});
  }
  static BRAZE_INLINE R low_halves(R even, R odd) {
    using Words = Register<uint32_t, 2 * kOne>;
    return [=]<size_t... i>(std::index_sequence<i...>) BRAZE_LAMBDA {
      return bits_as<R>(__builtin_shufflevector(bits_as<Words>(even), bits_as<Words>(odd << 32),
                                                (i % 2 == 0 ? i : 2 * kOne + i)...));
    }(std::make_index_sequence<2 * kOne>{});
  }
};

// The lanes of mask indices [begin, begin + n), both multiples of kMaskStep.
constexpr int64_t kMaskStep = 128;
static_assert(kMaskStep % (kLanesPerBlock * Counters::kCount) == 0);

void fill_lanes(const RandomState& random, int64_t begin, int64_t n, uint16_t* out) {
  const auto key0 = static_cast<uint32_t>(random.seed);
  const auto key1 = static_cast<uint32_t>(random.seed >> 32);
  for (int64_t i = 0; i < n; i += kLanesPerBlock * Counters::kCount) {
    // No carry: the number of counters divides the first one.
    const uint64_t block = static_cast<uint64_t>(begin + i) / kLanesPerBlock;
    Counters::Word c[4] = {Counters::count_from(static_cast<uint32_t>(block)),
                           Counters::Word(block >> 32),
                           Counters::Word(static_cast<uint32_t>(random.offset)),
                           Counters::Word(static_cast<uint32_t>(random.offset >> 32))};
    philox4x32<kDropoutRounds, Counters>(c, key0, key1);
    Counters::store(c, out + i);
  }
}

// The lanes of the elements of a tile: its own, or those of its rows or channels, of which a window
// is kept.
class LaneSource {
 public:
  explicit LaneSource(const DropoutArgs& args) : mask_(args.mask), random_(args.random) {}

  // Of elements [begin, begin + n), n <= kDropoutTile; begin is a multiple of kDropoutTile.
  const uint16_t* of(int64_t begin, int64_t n) {
    if (mask_.kind == DropoutMask::element) {
      fill_lanes(random_, begin, (n + kMaskStep - 1) / kMaskStep * kMaskStep, tile_);
      return tile_;
    }
    const bool last = mask_.kind == DropoutMask::channels_last;
    const int64_t length = last ? mask_.channels : mask_.spatial;
    int64_t row = begin / length, within = begin - row * length;
    for (int64_t i = 0; i < n; ++row, within = 0) {
      const int64_t count = std::min(n - i, length - within);
      if (last) {
        const int64_t index = row / mask_.spatial * mask_.channels + within;
        memcpy(tile_ + i, window(index, count), static_cast<size_t>(count) * sizeof(uint16_t));
      } else {
        fill(tile_ + i, count, *window(row, 1));
      }
      i += count;
    }
    return tile_;
  }

 private:
  // Writes up to a register more.
  static void fill(uint16_t* to, int64_t n, uint16_t value) {
    const Register<uint16_t, kRegister / 2> all = Register<uint16_t, kRegister / 2>{} + value;
    using InMemory = RegisterOf<uint16_t, kRegister / 2>::InMemory;
    for (int64_t i = 0; i < n; i += kRegister / 2) *reinterpret_cast<InMemory*>(to + i) = all;
  }

  // Of mask indices [index, index + n), n <= kDropoutTile.
  const uint16_t* window(int64_t index, int64_t n) {
    if (index < window_begin_ || index + n > window_begin_ + kWindow) {
      window_begin_ = index / kMaskStep * kMaskStep;
      fill_lanes(random_, window_begin_, kWindow, window_);
    }
    return window_ + (index - window_begin_);
  }

  static constexpr int64_t kWindow = kDropoutTile + 4 * kMaskStep;
  const DropoutMask mask_;
  const RandomState random_;
  int64_t window_begin_ = -kWindow;
  alignas(64) uint16_t tile_[kDropoutTile + kRegister / 2];
  alignas(64) uint16_t window_[kWindow];
};

// n <= kDropoutTile elements. `second` is not read by steps that have none; out may be an input.
template <class S>
struct Tile {
  const S* x;
  const S* second;
  S* out;
  const uint16_t* lanes;
  int64_t n;
};

template <class S>
using VectorOf = std::conditional_t<sizeof(S) == 2, Wide<Arithmetic<S>>, Vec<Arithmetic<S>>>;

template <class S, class Count>
BRAZE_INLINE auto kept(const uint16_t* lanes, uint32_t threshold, Count count) {
  using V = VectorOf<S>;
  // Not every set compares 64-bit integers.
  using Numbers = std::conditional_t<sizeof(S) == 8, V, Lanes<int32_t, V::kLanes>>;
  const Numbers limit(static_cast<int32_t>(threshold));
  if constexpr (std::is_same_v<S, Bf16>) {
    return Numbers::load_in_any_order(lanes, count) >= limit;
  } else {
    return Numbers::load(lanes, count) >= limit;
  }
}

// kStep, whose activation is ReLU.
template <class S, DropoutStep kStep>
void step(const Tile<S>& tile, const DropoutArgs& args) {
  using V = VectorOf<S>;
  using T = Arithmetic<S>;
  const DropoutTerms<T> terms = round_terms<T>(args.terms);
  each_vector<V>(tile.n, [t = tile, terms, threshold = args.threshold](int64_t i,
                                                                       auto count) BRAZE_LAMBDA {
    const auto load = [=](const S* p) BRAZE_LAMBDA { return V::load_in_any_order(p + i, count); };
    const auto mask = [=] BRAZE_LAMBDA { return kept<S>(t.lanes + i, threshold, count); };
    V y;
    if constexpr (kStep == DropoutStep::scale) {
      y = drop(mask(), load(t.x), terms);
    } else if constexpr (kStep == DropoutStep::add) {
      y = drop_and_add(mask(), load(t.x), load(t.second), terms.scale);
    } else if constexpr (kStep == DropoutStep::activate) {
      y = activate_and_drop<Activation::relu>(mask(), load(t.x), T(0), terms.scale);
    } else {
      y = relu_and_drop_grad(load(t.x), load(t.second), terms.scale);
    }
    y.store_in_any_order(t.out + i, count);
  });
}

// Other activations: by the functions over arrays.
template <class S>
void activate_any(const Tile<S>& tile, const DropoutArgs& args) {
  using T = Arithmetic<S>;
  using V = VectorOf<S>;
  const bool backward = args.step == DropoutStep::activate_grad;
  const ActivationLoops<T>& loops = activations.template of<T>();
  alignas(64) T value[kDropoutTile + V::kLanes];
  each_vector<V>(tile.n, [t = tile, &value](int64_t i, auto count) BRAZE_LAMBDA {
    V::load_in_any_order(t.x + i, count).store(value + i);
  });
  const auto a = static_cast<size_t>(args.activation);
  (backward ? loops.derivative : loops.value)[a](value, tile.n, static_cast<T>(args.parameter));
  const T factor = static_cast<T>(args.terms.scale);
  each_vector<V>(tile.n, [t = tile, &value, factor, backward, threshold = args.threshold](
                             int64_t i, auto count) BRAZE_LAMBDA {
    const V y = V::load(value + i);
    const auto mask = kept<S>(t.lanes + i, threshold, count);
    V out;
    if (backward) {
      out = drop_gradient(mask, y, V::load_in_any_order(t.second + i, count), factor);
    } else {
      out = drop_value(mask, y, factor);
    }
    out.store_in_any_order(t.out + i, count);
  });
}

template <class S>
auto loop_for(const DropoutArgs& args) {
  const bool is_relu = args.activation == Activation::relu;
  switch (args.step) {
    case DropoutStep::scale: return step<S, DropoutStep::scale>;
    case DropoutStep::add: return step<S, DropoutStep::add>;
    case DropoutStep::activate: return is_relu ? step<S, DropoutStep::activate> : activate_any<S>;
    default: return is_relu ? step<S, DropoutStep::activate_grad> : activate_any<S>;
  }
}

}  // namespace

void dropout_range(const DropoutArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    using S = decltype(element);
    const auto loop = loop_for<S>(args);
    const S* const x = static_cast<const S*>(args.x);
    const S* const second = static_cast<const S*>(args.second);
    S* const out = static_cast<S*>(args.out);
    LaneSource source(args);
    for (int64_t i = begin; i < end; i += kDropoutTile) {
      const int64_t n = std::min(kDropoutTile, end - i);
      const uint16_t* lanes = args.needs_mask() ? source.of(i, n) : nullptr;
      loop({x + i, second == nullptr ? nullptr : second + i, out + i, lanes, n}, args);
    }
  });
}

}  // namespace braze::cpu::BRAZE_SET
#include "../set_end.h"
