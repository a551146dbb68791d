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

// body(count, first element, stride) for all of a matrix, `count` rows at once, a constant: so that
// constants stay in registers; far apart, because the hardware prefetches long streams, not many
// short ones.
template <int kCount, class Body>
BRAZE_INLINE void rows_at_once(const Matrix& m, const Body& body) {
  const int64_t part = m.rows / kCount;
  for (int64_t r = 0; r < part; ++r) {
    body(std::integral_constant<int, kCount>{}, m.offset + r * m.stride, part * m.stride);
  }
  for (int64_t r = part * kCount; r < m.rows; ++r) {
    body(std::integral_constant<int, 1>{}, m.offset + r * m.stride, m.stride);
  }
}

// The vector of hot loops over S: bf16 without a mask is read and written in pairs.
template <class S>
constexpr bool kPairs = Wide<Arithmetic<S>>::template kInPairs<S>;
template <class S, bool kMask = false>
using HotVec = std::conditional_t<kPairs<S> && !kMask, Wide<Arithmetic<S>>, Vec<Arithmetic<S>>>;

// What columns a channel has: `pixels` copies of all channels, each of `span` neighbours; or, of
// one channel, all.
struct Spread {
  int64_t pixels = 1, span = 1;
  bool one_channel = false;
  bool in_pairs = false;  // in the order of HotVec's lanes, as far as there are whole vectors

  // What has the constants of column j: those of one channel are a single vector.
  BRAZE_INLINE int64_t at(int64_t j) const { return j & -int64_t{!one_channel}; }
  Spread in_order() const { return {pixels, span, one_channel}; }
};

// Numbers of `width` channels, by column. The result is `in` or `out`.
template <class T>
const T* spread_channels(const T* in, int64_t width, const Spread& to, T* out) {
  if (to.in_pairs) {
    const T* plain = spread_channels(in, width, to.in_order(), out);
    if (plain == in) std::memcpy(out, in, static_cast<size_t>(width) * sizeof(T));
    reorder_pairs<true>(out, width * to.pixels * to.span);
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
    each_vector<Vec<T>>(to.span, [&](int64_t j, auto n) { value.store(out + c * to.span + j, n); });
  }
  return out;
}

template <class T>
BRAZE_INLINE const T* spread(const T* in, int64_t width, const Spread& to, T* out) {
  if (!to.one_channel) return spread_channels(in, width, to, out);
  Lanes<T, 2 * kWidth<T>>(*in).store(out);
  return out;
}

// The constants of an input, by column.
template <class T>
struct Constants {
  const T *mean = nullptr, *scale = nullptr, *shift = nullptr;

  BRAZE_INLINE void set(const void* stats, int64_t c, int64_t first, int64_t width,
                        const Spread& to, T (*columns)[kMatrixColumns]) {
    if (stats == nullptr) return;
    const T* s = static_cast<const T*>(stats) + first;
    mean = spread(s + kMean * c, width, to, columns[0]);
    scale = spread(s + kScale * c, width, to, columns[1]);
    shift = spread(s + kShift * c, width, to, columns[2]);
  }
  template <class V, class N>
  BRAZE_INLINE V z(const V& x, int64_t c, N n) const {
    return normalize(x, V::load(mean + c, n), V::load(scale + c, n), V::load(shift + c, n));
  }
};

// `elements` after p, if there is a p.
template <class S>
BRAZE_INLINE const S* moved(const void* p, int64_t elements) {
  return p == nullptr ? nullptr : static_cast<const S*>(p) + elements;
}

// What z is made of, from some element on. All but x[0] may be null, x[1] or residual is.
template <class S>
struct Summands {
  const S *x[2], *residual;

  // z of n elements from j, whose constants are from column c.
  template <class T, class N>
  BRAZE_INLINE Vec<T> z(int64_t j, int64_t c, N n, const Constants<T>* k) const {
    Vec<T> z = k[0].z(Vec<T>::load(x[0] + j, n), c, n);
    if (residual != nullptr) return z + Vec<T>::load(residual + j, n);
    if (x[1] != nullptr) return z + k[1].z(Vec<T>::load(x[1] + j, n), c, n);
    return z;
  }
};

template <class S, class Args>
Summands<S> summands_at(const Args& a, int64_t e) {
  return {{moved<S>(a.input[0].x, e), moved<S>(a.input[1].x, e)}, moved<S>(a.residual, e)};
}

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

// sums += more
template <class T, class V, class N>
BRAZE_INLINE void add_to(T* sums, const V& more, N n) {
  (V::load(sums, n) + more).store(sums, n);
}

// The sums of `columns` columns by channel.
template <class T>
void fold_columns(const T* in, int64_t columns, int64_t width, int64_t span, double* out) {
  if (span > 1) {
    for (int64_t c = 0; c < width; ++c) out[c] = sum_of(in + c * span, std::min(span, columns));
    return;
  }
  each_vector<Vec<double>>(width, [&](int64_t j, auto n) {
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

// A plane that is cut up has this many sums: every so-manyth element is in one.
constexpr int64_t kPlaneSums = 32;

// A piece of what no hot case serves, between memory and the loops of activation_loops.h.
constexpr int64_t kPiece = 512;

// Up to 8 bytes as a number, and back.
BRAZE_INLINE uint64_t load_bytes(const uint8_t* p, int64_t n) {
  uint64_t word = 0;
  if (n >= 8) {
    std::memcpy(&word, p, 8);
  } else {
    for (int64_t i = 0; i < n; ++i) word |= uint64_t{p[i]} << (8 * i);
  }
  return word;
}
BRAZE_INLINE void store_bytes(uint64_t word, uint8_t* p, int64_t n) {
  if (n >= 8) {
    std::memcpy(p, &word, 8);
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

// Rows of a mask begin with a byte: where a row of a matrix has several, loops see their bits one
// after the other, in a buffer.
class JoinedBits {
 public:
  // The bits of elements [e, e + n): where they are read, and where they are to be written, after
  // which comes written().
  const uint8_t* of(const ActivationShape& shape, const uint8_t* mask, int64_t e, int64_t n) {
    if (!is_joined(shape, e, n)) return mask + mask_byte(shape, e);
    uint64_t word = 0;
    uint64_t* to = words_;
    each_word(shape, e, n, [&](int64_t byte, int64_t bit, int64_t count) BRAZE_LAMBDA {
      const uint64_t bits = load_bytes(mask + byte, (count + 7) / 8);
      word |= bits << bit;
      if (bit + count < 64) return;
      *to++ = word;
      word = bit == 0 ? 0 : bits >> (64 - bit);
    });
    *to = word;
    return reinterpret_cast<const uint8_t*>(words_);
  }
  uint8_t* to_write(const ActivationShape& shape, uint8_t* mask, int64_t e, int64_t n) {
    return is_joined(shape, e, n) ? reinterpret_cast<uint8_t*>(words_) : mask + mask_byte(shape, e);
  }
  void written(const ActivationShape& shape, uint8_t* mask, int64_t e, int64_t n) {
    if (!is_joined(shape, e, n)) return;
    const uint64_t* from = words_;
    each_word(shape, e, n, [&](int64_t byte, int64_t bit, int64_t count) BRAZE_LAMBDA {
      uint64_t bits = *from >> bit;
      if (bit + count >= 64) ++from;
      if (bit + count > 64) bits |= *from << (64 - bit);
      if (count < 64) bits &= (uint64_t{1} << count) - 1;
      store_bytes(bits, mask + byte, (count + 7) / 8);
    });
  }

 private:
  static bool is_joined(const ActivationShape& shape, int64_t e, int64_t n) {
    const int64_t row = shape.row();
    return row % 8 != 0 && e % row + n > row;
  }
  // body(byte of the mask, bit of a word, how many bits) for up to 64 bits of a row at a time.
  template <class Body>
  static BRAZE_INLINE void each_word(const ActivationShape& shape, int64_t e, int64_t n,
                                     const Body& body) {
    const int64_t row = shape.row();
    int64_t first = mask_byte(shape, e), bit = 0;
    for (int64_t begin = 0; begin < n; begin += row, first += (row + 7) / 8) {
      for (int64_t j = 0; j < row; j += 64) {
        const int64_t count = std::min(row - j, int64_t{64});
        body(first + j / 8, bit, count);
        bit = (bit + count) % 64;
      }
    }
  }

  uint64_t words_[kMatrixColumns / 64 + 1];
};

// set(first channel, how many, spread) and then body(matrix) for the rows of tiles [begin, end),
// and rest(first element, elements) for the last few pixels. Backwards: what was written last may
// still be in a cache. Where columns are in pairs, no matrix has more than kMatrixColumns.
template <class Set, class Body, class Rest>
void for_each_matrix(const Tiles& tiles, const Spread& to, int64_t begin, int64_t end,
                     const Set& set, const Body& body, const Rest& rest) {
  const int64_t c = tiles.shape.c;
  if (tiles.shape.channels_last) {
    if (const Matrix m = tiles.matrix(end - 1); m.tail > 0) {
      set(0, c, to.in_order());
      rest(m.offset + m.rows * m.stride, m.tail);
    }
    const int64_t slab = to.in_pairs ? std::min(c, kMatrixColumns) : c;
    for (int64_t first = 0; first < c; first += slab) {
      const int64_t width = std::min(slab, c - first);
      set(first, width, to);
      for (int64_t tile = end; tile > begin;) {
        Matrix m = tiles.matrix(--tile);
        m.offset += first;
        m.columns = tiles.fold * width;
        body(m);
      }
    }
    return;
  }
  int64_t have = -1;
  for (int64_t tile = end; tile > begin;) {
    Matrix m = tiles.matrix(--tile);
    const int64_t first = tiles.first_channel(tile), count = tiles.channels_of(first);
    if (!tiles.one_channel) {
      if (first != have) set(first, count, to);
      have = first;
      body(m);
      continue;
    }
    for (int64_t i = 0; i < count; ++i, m.offset += tiles.shape.spatial) {
      set(first + i, 1, to);
      body(m);
    }
  }
}

}  // namespace
}  // namespace braze::cpu::BRAZE_SET
