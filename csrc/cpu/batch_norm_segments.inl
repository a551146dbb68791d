// Steps on a segment: up to kSegment consecutive elements, in arithmetic type T, between memory of
// type S and small arrays. What the loops of the common cases do not do at once is made of these.
// Included once per instruction set.

#include "convert.inl"

namespace BRAZE_ISA {

constexpr int64_t kSegment = 512;

// Activations that have loops of their own, because they follow batch norm most often. None has a
// parameter.
constexpr bool is_direct_activation(Activation a) {
  return a == Activation::identity || a == Activation::relu || a == Activation::relu6 ||
         a == Activation::silu || a == Activation::hardswish;
}

// body.operator()<kA>() with the activation as a constant, where is_direct_activation.
template <class Body>
void with_direct_activation(Activation a, const Body& body) {
  with_activation<is_direct_activation>(
      a, [&](auto constant) { body.template operator()<decltype(constant)::value>(); });
}

template <Activation kA>
constexpr bool kNeedsZ = kA != Activation::identity;  // for the derivative

// The constants of a segment: one each for a plane, else one for each element.
template <class T>
struct Constants {
  const T* mean = nullptr;
  const T* scale = nullptr;
  const T* shift = nullptr;
  Constants at(int64_t column) const {
    return mean == nullptr ? *this : Constants{mean + column, scale + column, shift + column};
  }
};

template <class S>
S* moved(S* pointer, int64_t elements) {
  return pointer == nullptr ? pointer : pointer + elements;
}

// body.operator()<rows at once>(first element, stride, columns) for all of a matrix. At once, so
// that constants stay in registers; far apart, because the hardware prefetches long streams, not
// many short ones.
template <int kCount, class Body>
void rows_at_once(const Matrix& m, const Body& body) {
  const int64_t part = m.rows / kCount;
  for (int64_t r = 0; r < part; ++r) {
    body.template operator()<kCount>(m.offset + r * m.stride, part * m.stride, m.columns);
  }
  for (int64_t r = part * kCount; r < m.rows + (m.tail > 0); ++r) {
    body.template operator()<1>(m.offset + r * m.stride, m.stride, r < m.rows ? m.columns : m.tail);
  }
}

// Neighbours that a loop treats in one iteration: bf16 are read and written in pairs. What belongs
// to the columns of such a loop is in planar order: that of even columns, and kHalf later that of
// odd ones, so that no lane has to move.
template <class S>
constexpr int kPack = std::is_same_v<S, Bf16> ? 2 : 1;
constexpr int64_t kHalf = kMatrixColumns / 2;

template <class T>
BRAZE_TARGET void to_planar(const T* in, int64_t n, T* out) {
  for (int64_t j = 0; j < n / 2; ++j) out[j] = in[2 * j];
  for (int64_t j = 0; j < n / 2; ++j) out[kHalf + j] = in[2 * j + 1];
  if (n % 2 != 0) out[n / 2] = in[n - 1];
}

template <class T>
BRAZE_TARGET void from_planar(const T* in, int64_t n, T* out) {
  for (int64_t j = 0; j < n / 2; ++j) {
    out[2 * j] = in[j];
    out[2 * j + 1] = in[kHalf + j];
  }
  if (n % 2 != 0) out[n - 1] = in[n / 2];
}

typedef uint32_t __attribute__((may_alias, aligned(2))) Bf16Pair;

template <int kP, class S>
BRAZE_TARGET inline void load_elements(const S* in, Arithmetic<S>* out) {
  if constexpr (kP == 2) {
    const uint32_t pair = *reinterpret_cast<const Bf16Pair*>(in);
    out[0] = float_from_low_bf16(pair);
    out[1] = float_from_high_bf16(pair);
  } else {
    out[0] = from_storage(*in);
  }
}
template <int kP, class S>
BRAZE_TARGET inline void store_elements(const Arithmetic<S>* in, S* out) {
  if constexpr (kP == 2) {
    *reinterpret_cast<Bf16Pair*>(out) = bf16_pair_from_floats(in[0], in[1]);
  } else {
    to_storage(*in, *out);
  }
}

// A vector of channels as the columns of a loop: `pixels` copies side by side.
template <class T>
BRAZE_TARGET const T* as_columns(const T* in, int64_t width, int64_t pixels, bool planar, T* out) {
  if (pixels == 1 && !planar) return in;
  T repeated[kMatrixColumns];
  const T* columns = in;
  if (pixels > 1) {
    T* copies = planar ? repeated : out;
    for (int64_t j = 0; j < width; ++j) copies[j] = in[j];
    for (int64_t j = width; j < pixels * width; ++j) copies[j] = copies[j - width];
    columns = copies;
  }
  if (planar) to_planar(columns, pixels * width, out);
  return out;
}

// Memory that loops can read as it is, or a widened copy. fp16 cannot: gcc does not know its
// conversion instruction.
template <class S>
BRAZE_TARGET inline const S* readable(const S* in, int64_t, Arithmetic<S>*) {
  return in;
}
BRAZE_TARGET inline const float* readable(const F16* in, int64_t n, float* buffer) {
  widen(in, buffer, n);
  return buffer;
}

template <class T, class S>
BRAZE_TARGET void load_segment(const S* in, int64_t n, T* out) {
  if constexpr (std::is_same_v<S, F16>) {
    widen(in, out, n);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = from_storage(in[j]);
  }
}

template <class T, class S>
BRAZE_TARGET void store_segment(const T* in, int64_t n, S* out) {
  if constexpr (std::is_same_v<S, F16>) {
    narrow(in, out, n);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to_storage(in[j], out[j]);
  }
}

// out = a + b, rounded to their type as autograd's sums are: so it can be kept in memory, exactly.
template <class T, class S>
BRAZE_TARGET void add_segments(const S* a, const S* b, int64_t n, T* out) {
  T a_buffer[kSegment], b_buffer[kSegment];
  const auto* first = readable(a, n, a_buffer);
  const auto* second = readable(b, n, b_buffer);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = T(from_storage(first[j])) + from_storage(second[j]);
  if constexpr (!std::is_same_v<S, T>) {
    S sum[kSegment];
    store_segment(out, n, sum);
    load_segment(sum, n, out);
  }
}

enum class Add { nothing, residual, itself };

// z = the normalised x, plus the residual or what z holds.
template <bool kPlane, Add kAdd, class T, class S>
BRAZE_TARGET void normalize_segment(const S* in, const S* residual, const Constants<T>& k,
                                    int64_t n, T* z) {
  T x_buffer[kSegment], r_buffer[kSegment];
  const auto* x = readable(in, n, x_buffer);
  const auto* r = kAdd == Add::residual ? readable(residual, n, r_buffer) : x;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const int64_t c = kPlane ? 0 : j;
    T value = normalize(T(from_storage(x[j])), k.mean[c], k.scale[c], k.shift[c]);
    if constexpr (kAdd == Add::residual) value += T(from_storage(r[j]));
    if constexpr (kAdd == Add::itself) value += z[j];
    z[j] = value;
  }
}

// z1, z1 + z2 or z1 + residual of elements [e, e + n).
template <bool kPlane, class S, class T>
BRAZE_TARGET void normalize_inputs(const NormalizedInput* input, const void* residual, int64_t e,
                                   int64_t n, const Constants<T>& k, const Constants<T>& k2, T* z) {
  const S* x = static_cast<const S*>(input[0].x) + e;
  if (residual != nullptr) {
    const S* added = static_cast<const S*>(residual) + e;
    normalize_segment<kPlane, Add::residual>(x, added, k, n, z);
    return;
  }
  normalize_segment<kPlane, Add::nothing>(x, x, k, n, z);
  if (input[1].x == nullptr) return;
  const S* x2 = static_cast<const S*>(input[1].x) + e;
  normalize_segment<kPlane, Add::itself>(x2, x2, k2, n, z);
}

template <Activation kA, class T>
BRAZE_TARGET void activate_segment(T* z, int64_t n, T parameter) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) z[j] = activate<kA>(z[j], parameter);
}

// y = relu(z), the commonest activation, stored at once.
template <class T, class S>
BRAZE_TARGET void store_relu_segment(const T* z, int64_t n, S* y) {
  if constexpr (std::is_same_v<S, F16>) {
    T out[kSegment];
    for (int64_t j = 0; j < n; ++j) out[j] = activate<Activation::relu>(z[j], T(0));
    narrow(out, y, n);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to_storage(activate<Activation::relu>(z[j], T(0)), y[j]);
  }
}

// d holds dy before and dy * activation'(z) after.
template <Activation kA, class T>
BRAZE_TARGET void differentiate_segment(const T* z, T* d, int64_t n, T parameter) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) d[j] = activation_gradient<kA>(d[j], z[j], parameter);
}

constexpr int64_t kByte = 8;

// Where the mask has element e, which is the first of its byte.
inline int64_t mask_byte(const ActivationShape& shape, int64_t e) {
  const int64_t row = shape.row();
  return e / row * ((row + kByte - 1) / kByte) + e % row / kByte;
}

template <Activation kA, class T>
BRAZE_TARGET void mask_segment(const T* z, int64_t n, uint8_t* mask) {
  int64_t j = 0;
#if defined(BRAZE_AVX512)
  for (; j + 2 * kByte <= n; j += 2 * kByte) {
    alignas(64) int32_t upper[2 * kByte];
    for (int64_t k = 0; k < 2 * kByte; ++k) upper[k] = derivative_is_upper<kA>(z[j + k]) ? -1 : 0;
    const uint16_t bits = _mm512_movepi32_mask(_mm512_load_si512(upper));
    std::memcpy(mask + j / kByte, &bits, sizeof bits);
  }
#endif
  for (; j + kByte <= n; j += kByte) {
    alignas(32) int32_t upper[kByte];
    for (int64_t k = 0; k < kByte; ++k) upper[k] = derivative_is_upper<kA>(z[j + k]) ? -1 : 0;
#if defined(BRAZE_F16C)
    const __m256 bits = _mm256_load_ps(reinterpret_cast<const float*>(upper));
    mask[j / kByte] = static_cast<uint8_t>(_mm256_movemask_ps(bits));
#else
    int byte = 0;
    for (int k = 0; k < kByte; ++k) byte |= upper[k] & (1 << k);
    mask[j / kByte] = static_cast<uint8_t>(byte);
#endif
  }
  if (j < n) {
    int byte = 0;
    for (int64_t k = j; k < n; ++k) byte |= derivative_is_upper<kA>(z[k]) << (k - j);
    mask[j / kByte] = static_cast<uint8_t>(byte);
  }
}

// d = two_slope_gradient of a block, by its bits. The upper slope is not 0.
BRAZE_TARGET inline void masked_block(const uint8_t* bits, float upper, float lower, float* d) {
#if defined(BRAZE_AVX512)
  uint16_t mask;
  std::memcpy(&mask, bits, sizeof mask);
  const __m512 value = _mm512_loadu_ps(d);
  const __m512 on_lower =
      lower == 0 ? _mm512_setzero_ps() : _mm512_mul_ps(value, _mm512_set1_ps(lower));
  _mm512_storeu_ps(d, _mm512_mask_mul_ps(on_lower, mask, value, _mm512_set1_ps(upper)));
#else
  const uint32_t mask = bits[0] | static_cast<uint32_t>(bits[1]) << 8;
#pragma omp simd
  for (int k = 0; k < kBlock; ++k) {
    d[k] = two_slope_gradient(d[k], (mask & (1u << k)) != 0, upper, lower);
  }
#endif
}

// d = dy where the mask says upper, ..., for `n` elements from element `e` of the activation.
template <class T>
BRAZE_TARGET void masked_segment(const uint8_t* mask, int64_t row, int64_t e, int64_t n, T upper,
                                 T lower, T* d) {
  constexpr uint32_t kBits[kByte] = {1, 2, 4, 8, 16, 32, 64, 128};
  while (n > 0) {
    const bool whole = row % kByte == 0;  // then rows are next to each other in the mask as well
    const int64_t column = whole ? e : e % row;
    const uint8_t* bytes = mask + (whole ? 0 : e / row * ((row + kByte - 1) / kByte));
    const int64_t length = whole ? n : std::min(n, row - column);
    int64_t j = 0;
    if (column % kByte == 0) {
      if constexpr (std::is_same_v<T, float>) {
        for (; j + kBlock <= length; j += kBlock) {
          masked_block(bytes + (column + j) / kByte, upper, lower, d + j);
        }
      }
      for (; j + kByte <= length; j += kByte) {
        const uint32_t byte = bytes[(column + j) / kByte];
#pragma omp simd
        for (int64_t k = 0; k < kByte; ++k) {
          d[j + k] = two_slope_gradient(d[j + k], (byte & kBits[k]) != 0, upper, lower);
        }
      }
    }
    for (; j < length; ++j) {
      const bool bit = bytes[(column + j) / kByte] >> ((column + j) % kByte) & 1;
      d[j] = two_slope_gradient(d[j], bit, upper, lower);
    }
    d += length;
    e += length;
    n -= length;
  }
}

// A plane's elements are summed as this many interleaved sums, whatever the width of a vector.
constexpr int64_t kLanes = 32;

template <class T>
BRAZE_TARGET double sum_of_lanes(const T* in) {
  constexpr int64_t kTree = 8;
  T lanes[kTree];
  for (int64_t k = 0; k < kTree; ++k) {
    lanes[k] = (in[k] + in[k + kTree]) + (in[k + 2 * kTree] + in[k + 3 * kTree]);
  }
  double pairs[kTree / 2];
  for (int64_t k = 0; k < kTree / 2; ++k) {
    pairs[k] = static_cast<double>(lanes[k]) + static_cast<double>(lanes[k + kTree / 2]);
  }
  return (pairs[0] + pairs[2]) + (pairs[1] + pairs[3]);
}

template <class S, class T>
BRAZE_TARGET void clear_columns(int64_t columns, T* out) {
  constexpr int kP = kPack<S>;
  for (int64_t j = 0; j < (columns + kP - 1) / kP; ++j) {
    for (int p = 0; p < kP; ++p) out[p * kHalf + j] = T(0);
  }
}

// out[c] = the sum of column c and of those of the other pixels in the row, which are in the order
// that loops over S leave.
template <class S, class T>
BRAZE_TARGET void sum_of_pixels(const T* in, int64_t width, int64_t columns, double* out) {
  T plain[kMatrixColumns];
  if (kPack<S> > 1) {
    from_planar(in, columns, plain);
    in = plain;
  }
  for (int64_t j = 0; j < width; ++j) out[j] = static_cast<double>(in[j]);
  for (int64_t p = width; p < columns; p += width) {
    for (int64_t j = 0; j < width; ++j) out[j] += static_cast<double>(in[p + j]);
  }
}

}  // namespace BRAZE_ISA
