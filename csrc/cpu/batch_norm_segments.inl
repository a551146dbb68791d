// Steps on a segment: up to kSegment consecutive elements, in arithmetic type T, between memory of
// type S and small arrays. What the loops of the common cases do not do at once is made of these.
// Included once per instruction set.

#include "convert.inl"

namespace BRAZE_ISA {

constexpr int64_t kSegment = kMaxColumns;

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

// Neighbours that a loop treats in one iteration: bf16 are read and written in pairs. What belongs
// to the columns of such a loop is in planar order: that of even columns, and kHalf later that of
// odd ones, so that no lane has to move.
template <class S>
constexpr int kPack = std::is_same_v<S, Bf16> ? 2 : 1;
constexpr int64_t kHalf = kMaxColumns;

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
  T repeated[kMaxColumns];
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

// What loops can read as it is. fp16 cannot: gcc does not know its conversion instruction.
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

template <class T, class S>
BRAZE_TARGET void add_segment(const S* in, int64_t n, T* out) {
  T buffer[kSegment];
  const auto* a = readable(in, n, buffer);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] += from_storage(a[j]);
}

template <bool kPlane, bool kAdd, class T, class S>
BRAZE_TARGET void normalize_segment(const S* in, const Constants<T>& k, int64_t n, T* z) {
  T buffer[kSegment];
  const auto* x = readable(in, n, buffer);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const int64_t c = kPlane ? 0 : j;
    const T value = normalize(T(from_storage(x[j])), k.mean[c], k.scale[c], k.shift[c]);
    z[j] = kAdd ? z[j] + value : value;
  }
}

template <class T, class S>
BRAZE_TARGET void frozen_gradient_segment(const T* d, const T* on_grad, bool plane, int64_t n,
                                          S* dx) {
  T out[kSegment];
  for (int64_t j = 0; j < n; ++j) out[j] = input_gradient(d[j], on_grad[plane ? 0 : j]);
  store_segment(out, n, dx);
}

template <Activation kA, class T>
BRAZE_TARGET void activate_segment(T* z, int64_t n, T parameter) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) z[j] = activate<kA>(z[j], parameter);
}

// d holds dy before and dy * activation'(z) after.
template <Activation kA, class T>
BRAZE_TARGET void differentiate_segment(const T* z, T* d, int64_t n, T parameter) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) d[j] = activation_gradient<kA>(d[j], z[j], parameter);
}

constexpr int64_t kByte = 8;

template <Activation kA, class T>
BRAZE_TARGET void mask_segment(const T* z, int64_t n, uint8_t* mask) {
  if constexpr (has_two_slopes(kA)) {
    int64_t j = 0;
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
}

template <class T>
struct ActivationSegments {
  void (*activate)(T*, int64_t, T);
  void (*differentiate)(const T*, T*, int64_t, T);
  void (*mask)(const T*, int64_t, uint8_t*);
  T (*upper)();
  T (*lower)(T);
};

template <Activation kA, class T>
T upper_slope() {
  return upper_derivative<kA, T>();
}
template <Activation kA, class T>
T lower_slope(T parameter) {
  return lower_derivative<kA>(parameter);
}

template <class T, int... kA>
constexpr std::array<ActivationSegments<T>, kNumActivations> activation_table(
    std::integer_sequence<int, kA...>) {
  return {{{activate_segment<Activation{kA}, T>, differentiate_segment<Activation{kA}, T>,
            mask_segment<Activation{kA}, T>, upper_slope<Activation{kA}, T>,
            lower_slope<Activation{kA}, T>}...}};
}

template <class T>
inline constexpr std::array<ActivationSegments<T>, kNumActivations> kActivations =
    activation_table<T>(std::make_integer_sequence<int, kNumActivations>());

template <class T>
const ActivationSegments<T>& segments_of(Activation a) {
  return kActivations<T>[static_cast<size_t>(a)];
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

constexpr int64_t kTree = 16;

// The sum of `n` numbers: as 16 interleaved sums, then a tree in double.
template <class T>
BRAZE_TARGET double sum_of_columns(const T* in, int64_t n) {
  T lanes[kTree] = {};
  int64_t j = 0;
  for (; j + kTree <= n; j += kTree) {
    for (int64_t k = 0; k < kTree; ++k) lanes[k] += in[j + k];
  }
  for (int64_t k = 0; k < n - j; ++k) lanes[k] += in[j + k];
  double tree[kTree];
  for (int64_t k = 0; k < kTree; ++k) tree[k] = static_cast<double>(lanes[k]);
  for (int64_t width = kTree / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; ++k) tree[k] += tree[k + width];
  }
  return tree[0];
}

// out[c] = the sum of column c and of those of the other pixels in the row.
template <class T>
BRAZE_TARGET void sum_of_pixels(const T* in, int64_t width, int64_t columns, double* out) {
  for (int64_t j = 0; j < width; ++j) out[j] = static_cast<double>(in[j]);
  for (int64_t p = width; p < columns; p += width) {
    for (int64_t j = 0; j < width; ++j) out[j] += static_cast<double>(in[p + j]);
  }
}

template <class S, class T>
BRAZE_TARGET void clear_columns(int64_t columns, T* out) {
  constexpr int kP = kPack<S>;
  for (int64_t j = 0; j < (columns + kP - 1) / kP; ++j) {
    for (int p = 0; p < kP; ++p) out[p * kHalf + j] = T(0);
  }
}

// The sums of a loop's columns, by channel; S: the order of the columns.
template <class S, class T>
BRAZE_TARGET void sum_columns(const T* in, bool planes, int64_t width, int64_t columns,
                              double* out) {
  T plain[kMaxColumns];
  if (kPack<S> > 1) {
    from_planar(in, columns, plain);
    in = plain;
  }
  if (planes) {
    out[0] = sum_of_columns(in, columns);
  } else {
    sum_of_pixels(in, width, columns, out);
  }
}

}  // namespace BRAZE_ISA
