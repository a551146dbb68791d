// d, the gradient of the normalised value, and the constants of the backward. Included once per
// instruction set.

#include "batch_norm_channels.inl"

namespace BRAZE_ISA {

template <class T>
struct BackwardConstants {
  Constants<T> input[2];
  const T* on_grad[2] = {};
  const T* on_input[2] = {};
  const T* constant[2] = {};
  BackwardConstants at(int64_t column) const {
    BackwardConstants k = *this;
    for (int side = 0; side < 2; ++side) {
      k.input[side] = input[side].at(column);
      if (on_grad[side] == nullptr) continue;
      k.on_grad[side] += column;
      k.on_input[side] += column;
      k.constant[side] += column;
    }
    return k;
  }
};

// Whether d is dy, or a function of dy and x that the loops below know.
template <class S>
bool is_direct(const BackwardArgs& a) {
  if (a.dy2 != nullptr || std::is_same_v<S, F16>) return false;
  return a.activation == Activation::identity ||
         (is_direct_activation(a.activation) && a.mask == nullptr && a.residual == nullptr &&
          a.input[1].x == nullptr);
}

// kept: where d is to be left; the loops leave that of silu, and only where memory does not round.
template <class S>
bool is_direct_reduce(const BackwardArgs& a, const S* kept) {
  const bool keeps = a.activation == Activation::silu && std::is_same_v<S, Arithmetic<S>>;
  return is_direct<S>(a) && a.input[1].x == nullptr && (kept == nullptr || keeps);
}

template <class S>
bool is_direct_apply(const BackwardArgs& a) {
  return is_direct<S>(a) && a.grad[0].dx != nullptr && a.grad[1].dx == nullptr &&
         a.grad_residual == nullptr;
}

// Whether input_gradient_blocks can do it: both gradients of a join of two normalised inputs.
inline bool is_blocked_apply(const BackwardArgs& a) {
  return a.grad[0].dx != nullptr && a.grad[1].dx != nullptr && a.grad_residual == nullptr &&
         a.mask == nullptr && is_direct_activation(a.activation);
}

// d of elements [e, e + n).
template <bool kPlane, class S, class T>
BRAZE_TARGET void gradient_segment(const BackwardArgs& a, int64_t e, int64_t n,
                                   const BackwardConstants<T>& k, T* d) {
  const S* dy = static_cast<const S*>(a.dy) + e;
  if (a.dy2 != nullptr) {
    add_segments(dy, static_cast<const S*>(a.dy2) + e, n, d);
  } else {
    load_segment(dy, n, d);
  }
  if (a.activation == Activation::identity) return;
  const T parameter = static_cast<T>(a.parameter);
  if (a.mask != nullptr) {
    const Slopes<T> slopes = slopes_of(a.activation, parameter);
    masked_segment(a.mask, a.shape.row(), e, n, slopes.upper, slopes.lower, d);
    return;
  }
  T z[kSegment];
  normalize_inputs<kPlane, S>(a.input, a.residual, e, n, k.input[0], k.input[1], z);
  const auto differentiate = with_activation(
      a.activation, [](auto constant) { return differentiate_segment<constant(), T>; });
  differentiate(z, d, n, parameter);
}

// The constants of channels [begin, begin + width) as columns.
template <class T>
struct BackwardColumns {
  // coefficients: reduce has written them.
  BRAZE_TARGET BackwardConstants<T> of(const BackwardArgs& a, int64_t begin, int64_t width,
                                       int64_t pixels, bool planar, bool coefficients) {
    const int64_t c = a.shape.c;
    BackwardConstants<T> k;
    for (int side = 0; side < 2; ++side) {
      const T* s = static_cast<const T*>(a.input[side].stats);
      if (s == nullptr) continue;
      s += begin;
      T(*out)[2 * kHalf] = columns + 6 * side;
      k.input[side] = {as_columns(s + kMean * c, width, pixels, planar, out[0]),
                       as_columns(s + kScale * c, width, pixels, planar, out[1]),
                       as_columns(s + kShift * c, width, pixels, planar, out[2])};
      const T* f = static_cast<const T*>(a.grad[side].coefficients);
      if (f == nullptr || !coefficients) continue;
      f += begin;
      k.on_grad[side] = as_columns(f + kOnGrad * c, width, pixels, planar, out[3]);
      k.on_input[side] = as_columns(f + kOnInput * c, width, pixels, planar, out[4]);
      k.constant[side] = as_columns(f + kConstant * c, width, pixels, planar, out[5]);
    }
    return k;
  }
  alignas(64) T columns[12][2 * kHalf];
};

}  // namespace BRAZE_ISA
