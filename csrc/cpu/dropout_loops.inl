// Dropout over [begin, end) of a tensor, compiled once per instruction set: dropout_cpu.cpp
// includes this file with BRAZE_ISA (a namespace) and BRAZE_TARGET (a function attribute) set.

#include "convert.inl"

namespace BRAZE_ISA {

constexpr int64_t kDropoutTile = 512;

// Several counters at once for philox4x32, each word in the lower half of a 64-bit lane, as the
// multiplication wants it. Two vectors per word: their chains of operations overlap. By reference,
// for vectors cannot be passed to functions of another instruction set. store() brings the words
// into the order of counters. Masked forms for the reason given in convert.inl.
#if defined(BRAZE_AVX512)
struct Counters {
  static constexpr int kCount = 16;
  struct Word {
    __m512i v[2];
  };
  BRAZE_TARGET static inline Word multiply(uint32_t constant, const Word& w) {
    const __m512i c = _mm512_set1_epi64(constant);
    return {{_mm512_maskz_mul_epu32(0xff, w.v[0], c), _mm512_maskz_mul_epu32(0xff, w.v[1], c)}};
  }
  BRAZE_TARGET static inline __m512i mix(const __m512i& product, const __m512i& w, uint32_t key) {
    const __m512i high = _mm512_maskz_srli_epi64(0xff, product, 32);
    return _mm512_xor_si512(_mm512_xor_si512(high, w), _mm512_set1_epi64(key));
  }
  BRAZE_TARGET static inline Word mix(const Word& product, const Word& w, uint32_t key) {
    return {{mix(product.v[0], w.v[0], key), mix(product.v[1], w.v[1], key)}};
  }
  BRAZE_TARGET static inline Word all(uint32_t value) {
    return {{_mm512_set1_epi64(value), _mm512_set1_epi64(value)}};
  }
  BRAZE_TARGET static inline Word count_from(uint32_t first) {
    const __m512i steps = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    const __m512i start = _mm512_add_epi32(_mm512_set1_epi64(first), steps);
    return {{start, _mm512_add_epi32(start, _mm512_set1_epi64(8))}};
  }
  BRAZE_TARGET static inline void store(const Word (&c)[4], uint16_t* out) {
    for (int k = 0; k < 2; ++k) {
      const __m512i high1 = _mm512_maskz_slli_epi64(0xff, c[1].v[k], 32);
      const __m512i high3 = _mm512_maskz_slli_epi64(0xff, c[3].v[k], 32);
      const __m512i pair01 = _mm512_mask_mov_epi32(c[0].v[k], 0xaaaa, high1);
      const __m512i pair23 = _mm512_mask_mov_epi32(c[2].v[k], 0xaaaa, high3);
      // Counters 0 4 1 5 2 6 3 7 are in the lanes: unpacking pairs them as 0 1 2 3 and 4 5 6 7.
      _mm512_storeu_si512(out + 64 * k, _mm512_maskz_unpacklo_epi64(0xff, pair01, pair23));
      _mm512_storeu_si512(out + 64 * k + 32, _mm512_maskz_unpackhi_epi64(0xff, pair01, pair23));
    }
  }
};
#elif defined(BRAZE_F16C)
struct Counters {
  static constexpr int kCount = 8;
  struct Word {
    __m256i v[2];
  };
  BRAZE_TARGET static inline Word multiply(uint32_t constant, const Word& w) {
    const __m256i c = _mm256_set1_epi64x(constant);
    return {{_mm256_mul_epu32(w.v[0], c), _mm256_mul_epu32(w.v[1], c)}};
  }
  BRAZE_TARGET static inline __m256i mix(const __m256i& product, const __m256i& w, uint32_t key) {
    const __m256i high = _mm256_srli_epi64(product, 32);
    return _mm256_xor_si256(_mm256_xor_si256(high, w), _mm256_set1_epi64x(key));
  }
  BRAZE_TARGET static inline Word mix(const Word& product, const Word& w, uint32_t key) {
    return {{mix(product.v[0], w.v[0], key), mix(product.v[1], w.v[1], key)}};
  }
  BRAZE_TARGET static inline Word all(uint32_t value) {
    return {{_mm256_set1_epi64x(value), _mm256_set1_epi64x(value)}};
  }
  BRAZE_TARGET static inline Word count_from(uint32_t first) {
    const __m256i start =
        _mm256_add_epi32(_mm256_set1_epi64x(first), _mm256_set_epi64x(3, 1, 2, 0));
    return {{start, _mm256_add_epi32(start, _mm256_set1_epi64x(4))}};
  }
  BRAZE_TARGET static inline void store(const Word (&c)[4], uint16_t* out) {
    for (int k = 0; k < 2; ++k) {
      const __m256i pair01 = _mm256_blend_epi32(c[0].v[k], _mm256_slli_epi64(c[1].v[k], 32), 0xaa);
      const __m256i pair23 = _mm256_blend_epi32(c[2].v[k], _mm256_slli_epi64(c[3].v[k], 32), 0xaa);
      // Counters 0 2 1 3 are in the lanes: unpacking pairs them as 0 1 and 2 3.
      __m256i* to = reinterpret_cast<__m256i*>(out + 32 * k);
      _mm256_storeu_si256(to, _mm256_unpacklo_epi64(pair01, pair23));
      _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(pair01, pair23));
    }
  }
};
#else
struct Counters {
  static constexpr int kCount = 1;
  using Word = uint64_t;
  static inline Word multiply(uint32_t constant, Word w) {
    return OneCounter::multiply(constant, w);
  }
  static inline Word mix(Word p, Word w, uint32_t key) { return OneCounter::mix(p, w, key); }
  static inline Word all(uint32_t value) { return value; }
  static inline Word count_from(uint32_t first) { return first; }
  static inline void store(const Word (&c)[4], uint16_t* out) {
    for (int k = 0; k < 4; ++k) {
      out[2 * k] = static_cast<uint16_t>(c[k]);
      out[2 * k + 1] = static_cast<uint16_t>(c[k] >> 16);
    }
  }
};
#endif

// The lanes of mask indices [begin, begin + n), both multiples of kMaskStep.
constexpr int64_t kMaskStep = 128;
static_assert(kMaskStep % (kLanesPerBlock * Counters::kCount) == 0);

BRAZE_TARGET inline void fill_lanes(const RandomState& random, int64_t begin, int64_t n,
                                    uint16_t* out) {
  const auto key0 = static_cast<uint32_t>(random.seed);
  const auto key1 = static_cast<uint32_t>(random.seed >> 32);
  for (int64_t i = 0; i < n; i += kLanesPerBlock * Counters::kCount) {
    // No carry: the number of counters divides the first one.
    const uint64_t block = static_cast<uint64_t>(begin + i) / kLanesPerBlock;
    typename Counters::Word c[4] = {Counters::count_from(static_cast<uint32_t>(block)),
                                    Counters::all(static_cast<uint32_t>(block >> 32)),
                                    Counters::all(static_cast<uint32_t>(random.offset)),
                                    Counters::all(static_cast<uint32_t>(random.offset >> 32))};
    philox4x32<kDropoutRounds, Counters>(c, key0, key1);
    Counters::store(c, out + i);
  }
}

// The lanes of the elements of a tile: its own, or those of its rows or channels, of which a window
// is kept.
class Lanes {
 public:
  explicit Lanes(const DropoutArgs& args) : mask_(args.mask), random_(args.random) {}

  // Of elements [begin, begin + n), n <= kDropoutTile; begin is a multiple of kDropoutTile.
  BRAZE_TARGET const uint16_t* of(int64_t begin, int64_t n) {
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
        std::fill_n(tile_ + i, count, *window(row, 1));
      }
      i += count;
    }
    return tile_;
  }

 private:
  // Of mask indices [index, index + n), n <= kDropoutTile.
  BRAZE_TARGET const uint16_t* window(int64_t index, int64_t n) {
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
  alignas(64) uint16_t tile_[kDropoutTile];
  alignas(64) uint16_t window_[kWindow];
};

// One tile of T. `second` is not read by steps that have none; out may be an input.
template <class T>
using TileLoop = void (*)(const T* x, const T* second, T* out, const uint16_t* lanes, int64_t n,
                          const DropoutArgs& args);

template <class T>
BRAZE_TARGET void scale_tile(const T* x, const T*, T* out, const uint16_t* lanes, int64_t n,
                             const DropoutArgs& args) {
  const DropoutTerms<T> terms = round_terms<T>(args.terms);
  const uint32_t threshold = args.threshold;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = drop(is_kept(lanes[i], threshold), x[i], terms);
}

// The same for 16-bit types, so that the fp32 values stay in registers.
template <class S>
BRAZE_TARGET void scale_narrow(const S* x, S* out, const uint16_t* lanes, int64_t n,
                               const DropoutArgs& args) {
  const DropoutTerms<float> terms = round_terms<float>(args.terms);
  const uint32_t threshold = args.threshold;
  int64_t i = 0;
#if defined(BRAZE_AVX512)
  constexpr bool kBlocks = true;
#else
  constexpr bool kBlocks = std::is_same_v<S, F16>;  // bf16 is integer operations, as lanes are
#endif
  if constexpr (kBlocks) {
    for (; i + kBlock <= n; i += kBlock) {
      alignas(64) float value[kBlock];
      load_block(x + i, value);
#pragma omp simd
      for (int64_t k = 0; k < kBlock; ++k) {
        value[k] = drop(is_kept(lanes[i + k], threshold), value[k], terms);
      }
      store_block(value, out + i);
    }
  }
#pragma omp simd
  for (int64_t k = i; k < n; ++k) {
    to_storage(drop(is_kept(lanes[k], threshold), from_storage(x[k]), terms), out[k]);
  }
}

template <class T>
BRAZE_TARGET void add_tile(const T* x, const T* second, T* out, const uint16_t* lanes, int64_t n,
                           const DropoutArgs& args) {
  const T scale = static_cast<T>(args.terms.scale);
  const uint32_t threshold = args.threshold;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = drop_and_add(is_kept(lanes[i], threshold), x[i], second[i], scale);
  }
}

template <Activation kA, class T>
BRAZE_TARGET void activate_tile(const T* x, const T*, T* out, const uint16_t* lanes, int64_t n,
                                const DropoutArgs& args) {
  const T scale = static_cast<T>(args.terms.scale), parameter = static_cast<T>(args.parameter);
  const uint32_t threshold = args.threshold;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = activate_and_drop<kA>(is_kept(lanes[i], threshold), x[i], parameter, scale);
  }
}

template <Activation kA, class T>
BRAZE_TARGET void activate_grad_tile(const T* x, const T* second, T* out, const uint16_t* lanes,
                                     int64_t n, const DropoutArgs& args) {
  const T scale = static_cast<T>(args.terms.scale), parameter = static_cast<T>(args.parameter);
  const uint32_t threshold = args.threshold;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kA == Activation::relu) {
      out[i] = relu_and_drop_grad(x[i], second[i], scale);
    } else {
      const bool kept = is_kept(lanes[i], threshold);
      out[i] = activate_and_drop_grad<kA>(kept, x[i], second[i], parameter, scale);
    }
  }
}

template <class T>
TileLoop<T> tile_loop(const DropoutArgs& args) {
  switch (args.step) {
    case DropoutStep::scale: return scale_tile<T>;
    case DropoutStep::add: return add_tile<T>;
    default:
      return with_activation(args.activation, [&](auto constant) -> TileLoop<T> {
        return args.step == DropoutStep::activate_grad ? activate_grad_tile<constant(), T>
                                                       : activate_tile<constant(), T>;
      });
  }
}

// S is what memory holds.
template <class S>
BRAZE_TARGET void run_range(const DropoutArgs& args, int64_t begin, int64_t end) {
  using T = Arithmetic<S>;
  const TileLoop<T> loop = tile_loop<T>(args);
  const bool needs_mask = args.needs_mask();
  const S* const x = static_cast<const S*>(args.x);
  const S* const second = static_cast<const S*>(args.second);
  S* const out = static_cast<S*>(args.out);
  Lanes source(args);
  for (int64_t i = begin; i < end; i += kDropoutTile) {
    const int64_t n = std::min(kDropoutTile, end - i);
    const uint16_t* lanes = needs_mask ? source.of(i, n) : nullptr;
    const T* second_tile = nullptr;
    if constexpr (std::is_same_v<S, T>) {
      if (second != nullptr) second_tile = second + i;
      loop(x + i, second_tile, out + i, lanes, n, args);
    } else if (args.step == DropoutStep::scale) {
      scale_narrow(x + i, out + i, lanes, n, args);
    } else {
      alignas(64) T tile[kDropoutTile], other[kDropoutTile];
      widen(x + i, tile, n);
      if (second != nullptr) {
        widen(second + i, other, n);
        second_tile = other;
      }
      loop(tile, second_tile, tile, lanes, n, args);
      narrow(tile, out + i, n);
    }
  }
}

inline void dropout_range(const DropoutArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { run_range<decltype(element)>(args, begin, end); });
}

}  // namespace BRAZE_ISA
