// Between 16-bit memory and fp32 arithmetic, an array at a time. Included once per instruction set.

namespace BRAZE_ISA {

// kBlock elements at a time between memory and fp32. Fixed length, so that the compiler keeps a
// block in registers.
constexpr int64_t kBlock = 16;

BRAZE_TARGET inline void load_block(const float* in, float* out) {
  for (int64_t i = 0; i < kBlock; ++i) out[i] = in[i];
}

BRAZE_TARGET inline void store_block(const float* in, float* out) {
  for (int64_t i = 0; i < kBlock; ++i) out[i] = in[i];
}

BRAZE_TARGET inline void load_block(const Bf16* in, float* out) {
#if defined(BRAZE_AVX512)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  const __m512i wide =
      _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16);
  _mm512_storeu_ps(out, _mm512_castsi512_ps(wide));
#else
  for (int64_t i = 0; i < kBlock; ++i) out[i] = from_storage(in[i]);
#endif
}

BRAZE_TARGET inline void store_block(const float* in, Bf16* out) {
#if defined(BRAZE_AVX512)
  const __m512 value = _mm512_loadu_ps(in);
  __m256i result;
#if defined(BRAZE_AVX512BF16)
  // One instruction, except that it flushes denormals and keeps NaN payloads: those blocks take the
  // integer way.
  constexpr int kNanOrDenormal = 0x01 | 0x20 | 0x80;
  if (__builtin_expect(_mm512_fpclass_ps_mask(value, kNanOrDenormal) == 0, 1)) {
    result = reinterpret_cast<__m256i>(_mm512_maskz_cvtneps_pbh(0xffff, value));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), result);
    return;
  }
#endif
  // The steps of bf16_from_float. Masked forms: gcc 12 warns of uninitialised values inside the
  // plain ones.
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd =
      _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_maskz_srli_epi32(0xffff, sum, 16), nan,
                                                _mm512_set1_epi32(0x7fc0));
  result = _mm512_maskz_cvtepi32_epi16(0xffff, rounded);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), result);
#else
  for (int64_t i = 0; i < kBlock; ++i) to_storage(in[i], out[i]);
#endif
}

BRAZE_TARGET inline void load_block(const F16* in, float* out) {
#if defined(BRAZE_AVX512)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  _mm512_storeu_ps(out, _mm512_maskz_cvtph_ps(0xffff, bits));
#elif defined(BRAZE_F16C)
  for (int64_t i = 0; i < kBlock; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(bits));
  }
#else
  for (int64_t i = 0; i < kBlock; ++i) out[i] = from_storage(in[i]);
#endif
}

BRAZE_TARGET inline void store_block(const float* in, F16* out) {
#if defined(BRAZE_AVX512)
  const __m256i bits =
      _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bits);
#elif defined(BRAZE_F16C)
  for (int64_t i = 0; i < kBlock; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bits);
  }
#else
  for (int64_t i = 0; i < kBlock; ++i) to_storage(in[i], out[i]);
#endif
}

// For loops over more arrays than the hardware looks ahead in.
template <class S>
BRAZE_TARGET inline void prefetch_ahead(const S* block) {
  constexpr int kAhead = 512;  // bytes
  __builtin_prefetch(reinterpret_cast<const char*>(block) + kAhead);
}

template <class S>
BRAZE_TARGET void widen(const S* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) load_block(in + i, out + i);
  for (; i < n; ++i) out[i] = from_storage(in[i]);
}

template <class S>
BRAZE_TARGET void narrow(const float* in, S* out, int64_t n) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) store_block(in + i, out + i);
  for (; i < n; ++i) to_storage(in[i], out[i]);
}

}  // namespace BRAZE_ISA
