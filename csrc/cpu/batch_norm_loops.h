// What the passes of batch normalisation over activations share: rows of columns, constants and
// sums by column, the bits of masks. Once per instruction set.
#pragma once
#include "../math/batch_norm.h"
#include "batch_norm_geometry.h"
#include "simd.h"

namespace braze::cpu::BRAZE_SET {
namespace {

template <class T>
constexpr int64_t kWidth = Vec<T>::kLanes;

// body(count, first element, stride, columns) for all of a matrix, `count` rows at once, a constant:
// so that constants stay in registers; far apart, because the hardware prefetches long streams, not
// many short ones.
template <int kCount, class Body>
BRAZE_INLINE void rows_at_once(const Matrix& m, const Body& body) {
  const int64_t part = m.rows / kCount;
  for (int64_t r = 0; r < part; ++r) {
    body(std::integral_constant<int, kCount>{}, m.offset + r * m.stride, part * m.stride, m.columns);
  }
  for (int64_t r = part * kCount; r < m.rows + (m.tail > 0); ++r) {
    body(std::integral_constant<int, 1>{}, m.offset + r * m.stride, m.stride,
         r < m.rows ? m.columns : m.tail);
  }
}

// body(constant) for 0 ... kCount - 1.
template <int kCount, class Body>
BRAZE_INLINE void unrolled(const Body& body) {
  [&]<int... r>(std::integer_sequence<int, r...>) BRAZE_LAMBDA {
    (body(std::integral_constant<int, r>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// body(j, n) for columns [0, n), a vector at a time; the last, which may have fewer lanes, gets n.
template <class T, class Body>
BRAZE_INLINE void each_vector(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + kWidth<T> <= n; j += kWidth<T>) body(j, Whole{});
  if (j < n) body(j, n - j);
}

// What columns a channel has: `pixels` copies of all channels, each of `span` neighbours; or, of one
// channel, all.
struct Spread {
  int64_t pixels = 1, span = 1;
  bool one_channel = false;

  // What has the constants of column j: those of one channel are a single vector.
  BRAZE_INLINE int64_t at(int64_t j) const { return one_channel ? 0 : j; }
};

// Numbers of `width` channels, by column. The result is `in` or `out`.
template <class T>
const T* spread(const T* in, int64_t width, const Spread& to, T* out) {
  if (to.one_channel) {
    Vec<T>(*in).store(out);
    return out;
  }
  if (to.pixels == 1 && to.span == 1) return in;
  if (to.span == 1) {
    std::memcpy(out, in, static_cast<size_t>(width) * sizeof(T));
    // What has been copied so far is copied.
    for (int64_t done = width, all = width * to.pixels; done < all; done *= 2) {
      std::memcpy(out + done, out, static_cast<size_t>(std::min(done, all - done)) * sizeof(T));
    }
    return out;
  }
  for (int64_t c = 0; c < width; ++c) {
    const Vec<T> value = in[c];
    each_vector<T>(to.span, [&](int64_t j, auto n) { value.store(out + c * to.span + j, n); });
  }
  return out;
}

// The constants of an input, by column.
template <class T>
struct Constants {
  const T *mean = nullptr, *scale = nullptr, *shift = nullptr;

  void set(const void* stats, int64_t c, int64_t first, int64_t width, const Spread& to,
           T (*columns)[kMatrixColumns]) {
    if (stats == nullptr) return;
    const T* s = static_cast<const T*>(stats) + first;
    mean = spread(s + kMean * c, width, to, columns[0]);
    scale = spread(s + kScale * c, width, to, columns[1]);
    shift = spread(s + kShift * c, width, to, columns[2]);
  }
  template <class N>
  BRAZE_INLINE Vec<T> z(Vec<T> x, int64_t c, N n) const {
    return normalize(x, Vec<T>::load(mean + c, n), Vec<T>::load(scale + c, n),
                     Vec<T>::load(shift + c, n));
  }
};

// The sum of n neighbours, in an order that does not depend on the instruction set.
template <class S>
double sum_of(const S* in, int64_t n) {
  using T = Arithmetic<S>;
  using Sixteen = Lanes<T, 16>;
  Sixteen sum = Sixteen::load(in, n);
  for (int64_t j = 16; j < n; j += 16) sum += Sixteen::load(in + j, n - j);
  T lanes[16];
  sum.store(lanes);
  double pairs[8];
  (Vec<double>::load(lanes) + Vec<double>::load(lanes + 8)).store(pairs);
  return ((pairs[0] + pairs[4]) + (pairs[2] + pairs[6])) +
         ((pairs[1] + pairs[5]) + (pairs[3] + pairs[7]));
}

// The sums of `columns` columns by channel.
template <class T>
void fold_columns(const T* in, int64_t columns, int64_t width, int64_t span, double* out) {
  if (span > 1) {
    for (int64_t c = 0; c < width; ++c) out[c] = sum_of(in + c * span, std::min(span, columns));
    return;
  }
  each_vector<double>(width, [&](int64_t j, auto n) {
    Vec<double> sum = Vec<double>::load(in + j, n);
    for (int64_t p = width; p < columns; p += width) sum += Vec<double>::load(in + p + j, n);
    sum.store(out + j, n);
  });
}

// Where a mask has element e, the first of a byte.
BRAZE_INLINE int64_t mask_byte(const ActivationShape& shape, int64_t e) {
  const int64_t row = shape.row();
  return row % 8 == 0 ? e / 8 : e / row * ((row + 7) / 8) + e % row / 8;
}

// `elements` after p, if there is a p.
template <class S>
BRAZE_INLINE const S* moved(const void* p, int64_t elements) {
  return p == nullptr ? nullptr : static_cast<const S*>(p) + elements;
}

// A piece of what no hot case serves, between memory and the loops of activation_loops.h.
constexpr int64_t kPiece = 128;
template <class T>
BRAZE_INLINE int64_t whole_vectors(int64_t n) {
  return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// Rows of a mask begin with a byte: where a row of a matrix has several, loops see their bits one
// after the other, in a buffer.
class JoinedBits {
 public:
  // The bits of elements [e, e + n): where they are read, and where they are to be written, after
  // which comes written().
  const uint8_t* of(const ActivationShape& shape, const uint8_t* mask, int64_t e, int64_t n) {
    if (!is_joined(shape, e, n)) return mask + mask_byte(shape, e);
    std::memset(buffer_, 0, sizeof buffer_);
    each_byte(shape, e, n, [&](int64_t at, uint8_t* two, int64_t shift, int64_t) {
      uint16_t both;
      std::memcpy(&both, two, sizeof both);
      both = static_cast<uint16_t>(both | mask[at] << shift);
      std::memcpy(two, &both, sizeof both);
    });
    return buffer_;
  }
  uint8_t* to_write(const ActivationShape& shape, uint8_t* mask, int64_t e, int64_t n) {
    return is_joined(shape, e, n) ? buffer_ : mask + mask_byte(shape, e);
  }
  void written(const ActivationShape& shape, uint8_t* mask, int64_t e, int64_t n) {
    if (!is_joined(shape, e, n)) return;
    each_byte(shape, e, n, [&](int64_t at, const uint8_t* two, int64_t shift, int64_t count) {
      uint16_t both;
      std::memcpy(&both, two, sizeof both);
      mask[at] = static_cast<uint8_t>(both >> shift & ((1 << count) - 1));
    });
  }

 private:
  static bool is_joined(const ActivationShape& shape, int64_t e, int64_t n) {
    const int64_t row = shape.row();
    return row % 8 != 0 && e % row + n > row;
  }
  // body(byte of the mask, the two bytes of the buffer that have it, from which bit, how many bits).
  template <class Body>
  BRAZE_INLINE void each_byte(const ActivationShape& shape, int64_t e, int64_t n,
                              const Body& body) {
    const int64_t row = shape.row();
    int64_t byte = mask_byte(shape, e);
    for (int64_t begin = 0; begin < n; begin += row) {
      for (int64_t j = 0; j < row; j += 8) {
        body(byte++, buffer_ + (begin + j) / 8, (begin + j) % 8, std::min(row - j, int64_t{8}));
      }
    }
  }

  uint8_t buffer_[kMatrixColumns / 8 + 8];
};

// set(first channel, how many) and body(matrix) for all of tiles [begin, end). Backwards: what was
// written last may still be in a cache.
template <class Set, class Body>
void for_each_matrix(const Tiles& tiles, int64_t begin, int64_t end, const Set& set,
                     const Body& body) {
  const bool pixels = tiles.shape.channels_last;
  if (pixels) set(0, tiles.shape.c);
  int64_t have = -1;
  for (int64_t tile = end; tile > begin;) {
    Matrix m = tiles.matrix(--tile);
    if (pixels) {
      body(m);
      continue;
    }
    const int64_t first = tiles.first_channel(tile), count = tiles.channels_of(first);
    if (!tiles.one_channel) {
      if (first != have) set(first, count);
      have = first;
      body(m);
      continue;
    }
    for (int64_t i = 0; i < count; ++i, m.offset += tiles.shape.spatial) {
      set(first + i, 1);
      body(m);
    }
  }
}

}  // namespace
}  // namespace braze::cpu::BRAZE_SET
