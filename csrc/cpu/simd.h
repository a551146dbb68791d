// Vectors as values: a fixed number of lanes, in as many registers as the instruction set needs.
// The operators and functions that math/ is written in, and what has no operator: memory, bits of
// masks, lane by lane. Included once per instruction set, after set_begin.h.
#pragma once
#include "../math/arithmetic.h"
#include "../math/convert.h"

namespace braze::cpu::BRAZE_SET {

constexpr size_t kRegister = BRAZE_LEVEL >= 2 ? 64 : BRAZE_LEVEL == 1 ? 32 : 16;  // bytes

template <class E, int N>
struct RegisterOf {
  typedef E Type __attribute__((vector_size(N * sizeof(E))));
  typedef E InMemory __attribute__((vector_size(N * sizeof(E)), aligned(1), may_alias));
};
template <class E, int N>
using Register = typename RegisterOf<E, N>::Type;

template <class To, class From>
BRAZE_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return reinterpret_cast<To>(from);
}

template <size_t kSize>
using SignedOf = std::conditional_t<
    kSize == 8, int64_t,
    std::conditional_t<kSize == 4, int32_t, std::conditional_t<kSize == 2, int16_t, int8_t>>>;
template <size_t kSize>
using UnsignedOf = std::make_unsigned_t<SignedOf<kSize>>;

#define BRAZE_LAMBDA __attribute__((always_inline))

// One register: what the compiler has no operator for, by instruction set.
namespace reg {

template <class R, class F>
BRAZE_INLINE R by_lane(F&& f) {
  R out = {};
  for (size_t i = 0; i < sizeof(R) / sizeof(out[0]); ++i) out[i] = f(i);
  return out;
}

// What to return where R has lanes of 32 bits, and where of 64; the other is not compiled.
#define BRAZE_RETURN(narrow, wide)   \
  if constexpr (sizeof(R{}[0]) == 4) \
    return narrow;                   \
  else                               \
    return wide

template <class R>
BRAZE_INLINE R fma(R a, R b, R c) {
#if BRAZE_LEVEL >= 2
  BRAZE_RETURN(_mm512_fmadd_ps(a, b, c), _mm512_fmadd_pd(a, b, c));
#elif BRAZE_LEVEL == 1
  BRAZE_RETURN(_mm256_fmadd_ps(a, b, c), _mm256_fmadd_pd(a, b, c));
#elif defined(__aarch64__)
  BRAZE_RETURN(vfmaq_f32(c, a, b), vfmaq_f64(c, a, b));
#else
  return by_lane<R>([&](size_t i) BRAZE_LAMBDA { return fused_multiply_add(a[i], b[i], c[i]); });
#endif
}

template <class R>
BRAZE_INLINE R sqrt(R a) {
#if BRAZE_LEVEL >= 2
  BRAZE_RETURN(_mm512_maskz_sqrt_ps(0xffff, a), _mm512_maskz_sqrt_pd(0xff, a));
#elif BRAZE_LEVEL == 1
  BRAZE_RETURN(_mm256_sqrt_ps(a), _mm256_sqrt_pd(a));
#elif defined(__x86_64__)
  BRAZE_RETURN(_mm_sqrt_ps(a), _mm_sqrt_pd(a));
#elif defined(__aarch64__)
  BRAZE_RETURN(vsqrtq_f32(a), vsqrtq_f64(a));
#else
  return by_lane<R>([&](size_t i) BRAZE_LAMBDA { return square_root(a[i]); });
#endif
}

// a > b ? a : b and a < b ? a : b, lane by lane.
template <class R>
BRAZE_INLINE R larger(R a, R b) {
#if BRAZE_LEVEL >= 2
  BRAZE_RETURN(_mm512_maskz_max_ps(0xffff, a, b), _mm512_maskz_max_pd(0xff, a, b));
#elif BRAZE_LEVEL == 1
  BRAZE_RETURN(_mm256_max_ps(a, b), _mm256_max_pd(a, b));
#else
  return a > b ? a : b;
#endif
}
template <class R>
BRAZE_INLINE R smaller(R a, R b) {
#if BRAZE_LEVEL >= 2
  BRAZE_RETURN(_mm512_maskz_min_ps(0xffff, a, b), _mm512_maskz_min_pd(0xff, a, b));
#elif BRAZE_LEVEL == 1
  BRAZE_RETURN(_mm256_min_ps(a, b), _mm256_min_pd(a, b));
#else
  return a < b ? a : b;
#endif
}

// The even lanes of a and then those of b, or the odd ones; and back.
template <int kOdd, class R, int... i>
BRAZE_INLINE R every_other(R a, R b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i + kOdd)...);
}
template <int kHigh, class R, int... i>
BRAZE_INLINE R interleaved(R a, R b, std::integer_sequence<int, i...>) {
  constexpr int kLanes = sizeof...(i);
  return __builtin_shufflevector(a, b, (i / 2 + i % 2 * kLanes + kHigh * kLanes / 2)...);
}

// The lowest 32 bits of each lane, multiplied to 64.
template <class R>
BRAZE_INLINE R multiply_low(R a, R b) {
#if BRAZE_LEVEL >= 2
  return bits_as<R>(_mm512_maskz_mul_epu32(0xff, bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif BRAZE_LEVEL == 1
  return bits_as<R>(_mm256_mul_epu32(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#elif defined(__x86_64__)
  return bits_as<R>(_mm_mul_epu32(bits_as<__m128i>(a), bits_as<__m128i>(b)));
#elif defined(__aarch64__)
  return vmull_u32(vmovn_u64(a), vmovn_u64(b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// One bit per lane of a mask, whose lanes are 0 or -1.
template <class R>
BRAZE_INLINE uint32_t bits(R mask) {
#if BRAZE_LEVEL >= 2
  BRAZE_RETURN(_mm512_movepi32_mask(bits_as<__m512i>(mask)),
               _mm512_movepi64_mask(bits_as<__m512i>(mask)));
#elif BRAZE_LEVEL == 1
  BRAZE_RETURN(static_cast<uint32_t>(_mm256_movemask_ps(bits_as<__m256>(mask))),
               static_cast<uint32_t>(_mm256_movemask_pd(bits_as<__m256d>(mask))));
#elif defined(__x86_64__)
  BRAZE_RETURN(static_cast<uint32_t>(_mm_movemask_ps(bits_as<__m128>(mask))),
               static_cast<uint32_t>(_mm_movemask_pd(bits_as<__m128d>(mask))));
#else
  uint32_t out = 0;
  for (size_t i = 0; i < sizeof(R) / sizeof(mask[0]); ++i) out |= (mask[i] & 1u) << i;
  return out;
#endif
}

// The mask of these bits.
template <class R>
BRAZE_INLINE R from_bits(uint32_t bits) {
#if BRAZE_LEVEL >= 2
  BRAZE_RETURN(bits_as<R>(_mm512_movm_epi32(static_cast<__mmask16>(bits))),
               bits_as<R>(_mm512_movm_epi64(static_cast<__mmask8>(bits))));
#else
  using E = std::remove_cvref_t<decltype(R{}[0])>;
  const R which = [&]<size_t... i>(std::index_sequence<i...>) {
    return R{(E{1} << i)...};
  }(std::make_index_sequence<sizeof(R) / sizeof(E)>{});
  return (which & static_cast<E>(bits)) == which;
#endif
}

#undef BRAZE_RETURN

template <int N>
BRAZE_INLINE Register<uint32_t, N> widen(const uint16_t* p) {
  using Bits = Register<uint32_t, N>;
#if BRAZE_LEVEL >= 1  // gcc widens half a register at a time
  if constexpr (N == 16) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return bits_as<Bits>(_mm512_maskz_cvtepu16_epi32(0xffff, narrow));
  } else if constexpr (N == 8) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return bits_as<Bits>(_mm256_cvtepu16_epi32(narrow));
  } else {
    const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return bits_as<Bits>(_mm_cvtepu16_epi32(narrow));
  }
#else
  const auto narrow = *reinterpret_cast<const typename RegisterOf<uint16_t, N>::InMemory*>(p);
  return __builtin_convertvector(narrow, Bits);
#endif
}

// Lanes [0, N) of memory as E, whatever memory holds.
template <class E, int N, class S>
BRAZE_INLINE Register<E, N> load(const S* p) {
  if constexpr (std::is_same_v<S, F16>) {
    Register<float, N> wide;
#if BRAZE_LEVEL >= 1
    if constexpr (N == 16) {
      wide = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    } else if constexpr (N == 8) {
      wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    } else {
      wide = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
#else  // the steps of float_from_f16
    using Bits = Register<uint32_t, N>;
    const Bits half = widen<N>(&p->bits), magnitude = (half & 0x7fffu) << 13;
    const Bits finite = bits_as<Bits>(bits_as<Register<float, N>>(magnitude) * 0x1p112f);
    const Bits value = (half & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite;
    wide = bits_as<Register<float, N>>(value | (half & 0x8000u) << 16);
#endif
    return __builtin_convertvector(wide, Register<E, N>);
  } else if constexpr (std::is_same_v<S, Bf16>) {
    const auto wide = widen<N>(&p->bits) << 16;
    return __builtin_convertvector(bits_as<Register<float, N>>(wide), Register<E, N>);
  } else if constexpr (std::is_same_v<S, uint16_t>) {
    // As signed numbers, which have conversions.
    return __builtin_convertvector(bits_as<Register<int32_t, N>>(widen<N>(p)), Register<E, N>);
  } else {
    const auto value = *reinterpret_cast<const typename RegisterOf<S, N>::InMemory*>(p);
    return __builtin_convertvector(value, Register<E, N>);
  }
}

// The steps of bf16_from_float.
template <int N>
BRAZE_INLINE Register<uint16_t, N> round_to_bf16(Register<float, N> value) {
#if BRAZE_LEVEL == 3
  // One instruction, except that it flushes denormals and keeps NaN payloads: those go the integer
  // way.
  constexpr int kNanOrDenormal = 0x01 | 0x20 | 0x80;
  if constexpr (N == 16) {
    if (__builtin_expect(_mm512_fpclass_ps_mask(value, kNanOrDenormal) == 0, 1)) {
      return bits_as<Register<uint16_t, N>>(_mm512_maskz_cvtneps_pbh(0xffff, value));
    }
  }
#endif
  using Bits = Register<uint32_t, N>;
  const Bits bits = bits_as<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits result = value == value ? rounded : rounded * 0 + 0x7fc0u;
#if BRAZE_LEVEL == 1
  if constexpr (N == 8) {  // gcc takes a detour through shuffles
    const __m256i wide = bits_as<__m256i>(result);
    return bits_as<Register<uint16_t, N>>(
        _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
  }
#endif
  return __builtin_convertvector(result, Register<uint16_t, N>);
}

template <int N>
BRAZE_INLINE Register<uint16_t, N> round_to_f16(Register<float, N> value) {
  using Result = Register<uint16_t, N>;
#if BRAZE_LEVEL >= 1
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
  if constexpr (N == 16)
    return bits_as<Result>(_mm512_maskz_cvtps_ph(0xffff, value, kNearest));
  else if constexpr (N == 8)
    return bits_as<Result>(_mm256_cvtps_ph(value, kNearest));
  else
    return bits_as<Result>(_mm_cvtsi128_si64(_mm_cvtps_ph(value, kNearest)));
#else
  // The steps of f16_from_float, in signed numbers, which have comparisons.
  using Bits = Register<int32_t, N>;
  const Bits bits = bits_as<Bits>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const Bits denormal = bits_as<Bits>(bits_as<Register<float, N>>(magnitude) + 0.5f) - 0x3f000000;
  using Words = Register<uint32_t, N>;  // what is not chosen may wrap
  const Words words = bits_as<Words>(magnitude);
  const Bits normal = bits_as<Bits>((words - 0x38000000u + 0xfffu + (words >> 13 & 1u)) >> 13);
  const Bits nan = (magnitude >> 13 & 0x1ff) | 0x7e00, infinite = bits * 0 + 0x7c00;
  const Bits finite = magnitude < 0x38800000 ? denormal : normal;
  const Bits number = magnitude >= 0x477ff000 ? infinite : finite;
  return __builtin_convertvector(sign | (magnitude > 0x7f800000 ? nan : number), Result);
#endif
}

template <class E, int N, class S>
BRAZE_INLINE void store(Register<E, N> in, S* p) {
  if constexpr (std::is_same_v<S, Bf16> || std::is_same_v<S, F16>) {
    const auto value = __builtin_convertvector(in, Register<float, N>);
    auto* const out = reinterpret_cast<typename RegisterOf<uint16_t, N>::InMemory*>(p);
    if constexpr (std::is_same_v<S, Bf16>)
      *out = round_to_bf16<N>(value);
    else
      *out = round_to_f16<N>(value);
  } else {
    *reinterpret_cast<typename RegisterOf<S, N>::InMemory*>(p) =
        __builtin_convertvector(in, Register<S, N>);
  }
}

// Pairs of neighbours in memory, the first of each in one register and the second in another: half
// the steps of two registers of neighbours. One instruction set has better ones, and one has none.
constexpr bool kPairs = BRAZE_LEVEL == 1 || BRAZE_LEVEL == 2;
template <int N>
BRAZE_INLINE void store_pairs(Register<float, N> first, Register<float, N> second, Bf16* p) {
  using Bits = Register<uint32_t, N>;
  using Short = Register<uint16_t, 2 * N>;
  using Signed = Register<int16_t, 2 * N>;
  const auto alternate = [](Short even, Short odd) BRAZE_LAMBDA {
    return [&]<size_t... i>(std::index_sequence<i...>) BRAZE_LAMBDA {
      return __builtin_shufflevector(even, odd, (i % 2 == 0 ? i : 2 * N + i)...);
    }(std::make_index_sequence<2 * N>{});
  };
  const Bits a = bits_as<Bits>(first), b = bits_as<Bits>(second);
  const Short high = alternate(bits_as<Short>(a >> 16), bits_as<Short>(b));
  const Short low = alternate(bits_as<Short>(a), bits_as<Short>(b << 16));
  // Up if the low half is above 0x8000, or is that and the high half is odd.
  const Signed up = bits_as<Signed>(low ^ 0x8000) > -bits_as<Signed>(high & 1);
  Short result = high - bits_as<Short>(up);
#if BRAZE_LEVEL >= 2
  const bool nan = _mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q) != 0;
#elif BRAZE_LEVEL == 1
  const bool nan = _mm256_movemask_ps(_mm256_cmp_ps(first, second, _CMP_UNORD_Q)) != 0;
#else
  const bool nan = true;
#endif
  if (__builtin_expect(nan, 0)) {
    const auto are_nan =
        alternate(bits_as<Short>(first != first), bits_as<Short>(second != second));
    result = (result & ~are_nan) | (are_nan & 0x7fc0);
  }
  *reinterpret_cast<typename RegisterOf<uint16_t, 2 * N>::InMemory*>(p) = result;
}

}  // namespace reg

struct Nothing {};

// Instead of a count of lanes: all of a vector.
struct Whole {};

// N lanes of E, a number: one register, or two halves.
template <class E, int N>
struct Lanes {
  static constexpr bool kOne = N * sizeof(E) <= kRegister;
  static constexpr int kLanes = N;
  using Element = E;
  using Half = std::conditional_t<kOne, Register<E, N>, Lanes<E, N / 2>>;
  using Rest = std::conditional_t<kOne, Nothing, Half>;
  using Mask = Lanes<SignedOf<sizeof(E)>, N>;
  using Bits = Lanes<UnsignedOf<sizeof(E)>, N>;

  Half lo;
  [[no_unique_address]] Rest hi;

  Lanes() = default;
  BRAZE_INLINE Lanes(const Half& l, const Rest& h) : lo(l), hi(h) {}
  // All lanes the same.
  BRAZE_INLINE Lanes(E value) {
    if constexpr (kOne) {
      lo = [&]<size_t... i>(std::index_sequence<i...>) {
        return Half{((void)i, value)...};
      }(std::make_index_sequence<N>{});
    } else {
      lo = Half(value);
      hi = lo;
    }
  }

  // f of each register of the arguments.
  template <class Result = Lanes, class F, class... In>
  static BRAZE_INLINE Result map(F&& f, const In&... in) {
    if constexpr (kOne) {
      return {f(in.lo...), {}};
    } else {
      using Part = typename Result::Half;
      return {Half::template map<Part>(f, in.lo...), Half::template map<Part>(f, in.hi...)};
    }
  }

#define BRAZE_OPERATOR(op)                                                              \
  friend BRAZE_INLINE Lanes operator op(const Lanes& a, const Lanes& b) {               \
    return map([](const auto& x, const auto& y) BRAZE_LAMBDA { return x op y; }, a, b); \
  }
#define BRAZE_COMPARISON(op)                                                                  \
  friend BRAZE_INLINE Mask operator op(const Lanes& a, const Lanes& b) {                      \
    return map<Mask>([](const auto& x, const auto& y) BRAZE_LAMBDA { return x op y; }, a, b); \
  }
  BRAZE_OPERATOR(+)
  BRAZE_OPERATOR(-)
  BRAZE_OPERATOR(*)
  BRAZE_OPERATOR(/)
  BRAZE_OPERATOR(&)
  BRAZE_OPERATOR(|)
  BRAZE_OPERATOR(^)
  BRAZE_OPERATOR(<<)
  BRAZE_OPERATOR(>>)
  BRAZE_COMPARISON(<)
  BRAZE_COMPARISON(<=)
  BRAZE_COMPARISON(>)
  BRAZE_COMPARISON(>=)
  BRAZE_COMPARISON(==)
  BRAZE_COMPARISON(!=)
#undef BRAZE_OPERATOR
#undef BRAZE_COMPARISON
  friend BRAZE_INLINE Lanes operator-(const Lanes& a) {
    return map([](const auto& x) BRAZE_LAMBDA { return -x; }, a);
  }
  // Of masks. Both sides are computed.
  friend BRAZE_INLINE Lanes operator&&(const Lanes& a, const Lanes& b) { return a & b; }
  friend BRAZE_INLINE Lanes operator!(const Lanes& a) {
    return map([](const auto& x) BRAZE_LAMBDA { return ~x; }, a);
  }
  BRAZE_INLINE Lanes& operator+=(const Lanes& other) { return *this = *this + other; }
  BRAZE_INLINE Lanes& operator*=(const Lanes& other) { return *this = *this * other; }

  // Of a, or of the first n lanes of it, n >= 0; what memory has no lane for is 0.
  template <class S>
  static BRAZE_INLINE Lanes load(const S* p, Whole = {}) {
    if constexpr (kOne) {
      return {reg::load<E, N>(p), {}};
    } else {
      return {Half::load(p), Half::load(p + N / 2)};
    }
  }
  template <class S>
  static BRAZE_INLINE Lanes load(const S* p, int64_t n) {
    if (n >= N) return load(p);
    alignas(64) S all[N] = {};
#if BRAZE_LEVEL >= 2
    if constexpr (sizeof(all) == 64) {
      _mm512_store_si512(all, _mm512_maskz_loadu_epi8((1ull << n * sizeof(S)) - 1, p));
      return load(all);
    }
#endif
    for (int64_t i = 0; i < n; ++i) all[i] = p[i];
    return load(all);
  }
  template <class S>
  BRAZE_INLINE void store(S* p, Whole = {}) const {
    if constexpr (kOne) {
      reg::store<E, N>(lo, p);
    } else {
      lo.store(p);
      hi.store(p + N / 2);
    }
  }
  template <class S>
  BRAZE_INLINE void store(S* p, int64_t n) const {
    if (n >= N) return store(p);
    alignas(64) S all[N];
    store(all);
#if BRAZE_LEVEL >= 2
    if constexpr (sizeof(all) == 64) {
      _mm512_mask_storeu_epi8(p, (1ull << n * sizeof(S)) - 1, _mm512_load_si512(all));
      return;
    }
#endif
    for (int64_t i = 0; i < n; ++i) p[i] = all[i];
  }
  // The same where the order of lanes does not matter, as long as it is the same for all arrays,
  // which must be of Bf16 and of uint16_t alone, or of neither.
  template <class S>
  static constexpr bool kInPairs = reg::kPairs && N * sizeof(E) == 2 * kRegister &&
                                   (std::is_same_v<S, Bf16> || std::is_same_v<S, uint16_t>);
  template <class S, class Count = Whole>
  static BRAZE_INLINE Lanes load_in_any_order(const S* p, Count n = {}) {
    if constexpr (kInPairs<S> && std::is_same_v<Count, Whole>) {
      using InMemory = typename RegisterOf<uint32_t, N / 2>::InMemory;
      const Register<uint32_t, N / 2> pairs = *reinterpret_cast<const InMemory*>(p);
      using R = Register<E, N / 2>;
      if constexpr (std::is_same_v<S, Bf16>) {
        return {Half(bits_as<R>(pairs << 16), {}), Half(bits_as<R>(pairs & 0xffff0000u), {})};
      } else {
        return {Half(bits_as<R>(pairs & 0xffffu), {}), Half(bits_as<R>(pairs >> 16), {})};
      }
    } else {
      return load(p, n);
    }
  }
  template <class S, class Count = Whole>
  BRAZE_INLINE void store_in_any_order(S* p, Count n = {}) const {
    if constexpr (kInPairs<S> && std::is_same_v<Count, Whole>) {
      reg::store_pairs<N / 2>(lo.lo, hi.lo, p);
    } else {
      store(p, n);
    }
  }
  // Of a mask: its bits, and the mask that has them.
  BRAZE_INLINE uint32_t bits() const {
    if constexpr (kOne) {
      return reg::bits(lo);
    } else {
      return lo.bits() | hi.bits() << (N / 2);
    }
  }
  static BRAZE_INLINE Lanes from_bits(uint32_t bits) {
    if constexpr (kOne) {
      return {reg::from_bits<Half>(bits), {}};
    } else {
      return {Half::from_bits(bits), Half::from_bits(bits >> (N / 2))};
    }
  }

  friend BRAZE_INLINE Lanes select(const Mask& mask, const Lanes& a, const Lanes& b) {
    return map([](const auto& m, const auto& x, const auto& y) BRAZE_LAMBDA { return m ? x : y; },
               mask, a, b);
  }
  friend BRAZE_INLINE Lanes fused_multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
    return map([](const auto& x, const auto& y, const auto& z)
                   BRAZE_LAMBDA { return reg::fma(x, y, z); },
               a, b, c);
  }
  friend BRAZE_INLINE Lanes larger(const Lanes& a, const Lanes& b) {
    return map([](const auto& x, const auto& y) BRAZE_LAMBDA { return reg::larger(x, y); }, a, b);
  }
  friend BRAZE_INLINE Lanes smaller(const Lanes& a, const Lanes& b) {
    return map([](const auto& x, const auto& y) BRAZE_LAMBDA { return reg::smaller(x, y); }, a, b);
  }
  friend BRAZE_INLINE Lanes square_root(const Lanes& a) {
    return map([](const auto& x) BRAZE_LAMBDA { return reg::sqrt(x); }, a);
  }
  friend BRAZE_INLINE Bits bits_from_float(const Lanes& a) {
    return map<Bits>(
        [](const auto& x) BRAZE_LAMBDA {
          return bits_as<Register<UnsignedOf<sizeof(E)>, sizeof(x) / sizeof(E)>>(x);
        },
        a);
  }
  friend BRAZE_INLINE Lanes<float, N> float_from_bits(const Lanes& a)
    requires std::is_same_v<E, uint32_t>
  {
    return map<Lanes<float, N>>(
        [](const auto& x)
            BRAZE_LAMBDA { return bits_as<Register<float, sizeof(x) / sizeof(E)>>(x); },
        a);
  }
  friend BRAZE_INLINE Lanes multiply_low(const Lanes& a, const Lanes& b)
    requires std::is_same_v<E, uint64_t>
  {
    return map([](const auto& x, const auto& y) BRAZE_LAMBDA { return reg::multiply_low(x, y); }, a,
               b);
  }
  template <class T>
  friend BRAZE_INLINE Lanes round_through(const Lanes& a)
    requires std::is_same_v<E, double>
  {
    if constexpr (sizeof(T) == 8)
      return a;
    else
      return Lanes::map(
          [](const auto& x) BRAZE_LAMBDA {
            using R = std::remove_cvref_t<decltype(x)>;
            return __builtin_convertvector(
                __builtin_convertvector(x, Register<float, sizeof(R) / 8>), R);
          },
          a);
  }
#define BRAZE_BY_LANE(name)                                              \
  friend BRAZE_INLINE Lanes name(const Lanes& a)                         \
    requires std::is_same_v<E, double>                                   \
  {                                                                      \
    return map(                                                          \
        [](const auto& x) BRAZE_LAMBDA {                                 \
          return reg::by_lane<std::remove_cvref_t<decltype(x)>>(         \
              [&](size_t i) BRAZE_LAMBDA { return braze::name(x[i]); }); \
        },                                                               \
        a);                                                              \
  }
  BRAZE_BY_LANE(exponential)
  BRAZE_BY_LANE(exponential_minus_1)
  BRAZE_BY_LANE(logarithm_of_1_plus)
  BRAZE_BY_LANE(normal_cdf)
#undef BRAZE_BY_LANE
};

// body(constant) for 0 ... kCount - 1.
template <int kCount, class Body>
BRAZE_INLINE void unrolled(const Body& body) {
  [&]<int... r>(std::integer_sequence<int, r...>) BRAZE_LAMBDA {
    (body(std::integral_constant<int, r>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// What belongs to the elements of an array that is loaded in pairs, in the order of their lanes, as
// far as there are whole vectors; and back. In place.
template <bool kTo, class T>
void reorder_pairs(T* p, int64_t count) {
  using V = Lanes<T, kRegister / sizeof(T)>;
  constexpr auto kAll = std::make_integer_sequence<int, V::kLanes>{};
  for (; count >= 2 * V::kLanes; count -= 2 * V::kLanes, p += 2 * V::kLanes) {
    const auto a = V::load(p).lo, b = V::load(p + V::kLanes).lo;
    V(kTo ? reg::every_other<0>(a, b, kAll) : reg::interleaved<0>(a, b, kAll), {}).store(p);
    V(kTo ? reg::every_other<1>(a, b, kAll) : reg::interleaved<1>(a, b, kAll), {})
        .store(p + V::kLanes);
  }
}

// f of vectors of one register each: a long formula of two at once would not stay in registers.
template <class F, class V, class... Vs>
BRAZE_INLINE V by_register(const F& f, const V& a, const Vs&... rest) {
  if constexpr (V::kOne) {
    return f(a, rest...);
  } else {
    return {by_register(f, a.lo, rest.lo...), by_register(f, a.hi, rest.hi...)};
  }
}

// Between the bits of a mask and memory, where a vector has whole bytes of them.
template <class V>
BRAZE_INLINE void store_bits(uint32_t bits, uint8_t* p) {
  const auto value = static_cast<UnsignedOf<V::kLanes / 8>>(bits);
  memcpy(p, &value, sizeof value);
}
template <class V>
BRAZE_INLINE uint32_t load_bits(const uint8_t* p) {
  UnsignedOf<V::kLanes / 8> value;
  memcpy(&value, p, sizeof value);
  return value;
}

// body(i, n) for each vector of [0, n): n is Whole, or of the last less than a vector.
template <class V, class Body>
BRAZE_INLINE void each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) body(i, Whole{});
  if (i < n) body(i, n - i);
}

// The vector of the loops over T.
template <class T>
using Vec = Lanes<T, BRAZE_LEVEL >= 2 ? 64 / sizeof(T) : 8>;

// The vector of loops over 16-bit memory: two registers or more, whose lanes may be pairs. A whole
// number of the other.
template <class T>
using Wide = Lanes<T, std::max<int>(2 * kRegister / sizeof(T), Vec<T>::kLanes)>;

}  // namespace braze::cpu::BRAZE_SET
