// d and what is made of it, a block of 16 elements at a time, for joins: of relu(bn(x) + residual)
// and the like, whose mask the forward left, and of act(bn(x) + bn2(x2)), whose x and x2 are read
// anyway. Included once per instruction set.

#include "batch_norm_gradient.inl"

namespace BRAZE_ISA {

template <class T>
struct GradientSums {
  T* grad;
  T* input[2];
  GradientSums at(int64_t column) const {
    return {grad + column, {input[0] + column, input[1] + column}};
  }
};

// What d is made of, and where it is left. dy2, x[1], kept, mask: may be null.
template <class S>
struct GradientSource {
  const S* dy;
  const S* dy2;
  const S* x[2];
  S* kept;
  const uint8_t* mask;
  float upper, lower;  // slopes
};

template <class S>
BRAZE_TARGET GradientSource<S> gradient_source(const BackwardArgs& a, S* kept) {
  const Slopes<float> slopes = slopes_of(a.activation, static_cast<float>(a.parameter));
  return {static_cast<const S*>(a.dy),
          static_cast<const S*>(a.dy2),
          {static_cast<const S*>(a.input[0].x), static_cast<const S*>(a.input[1].x)},
          kept,
          a.mask,
          slopes.upper,
          slopes.lower};
}

// body.operator()<kSides, kA>() and true, where blocks serve: with one side by the mask, with two
// by the activation of z1 + z2.
template <class Body>
bool with_gradient_blocks(const BackwardArgs& a, const Body& body) {
  const bool two = a.input[1].x != nullptr;
  if (two != (a.mask == nullptr) || (two && !is_direct_activation(a.activation))) return false;
  if (two) {
    with_direct_activation(a.activation,
                           [&]<Activation kA>() { body.template operator()<2, kA>(); });
  } else {
    body.template operator()<1, Activation::identity>();
  }
  return true;
}

BRAZE_TARGET inline float sum_of_inputs(float x, float x2, const Constants<float>* k, int64_t c) {
  return normalize(x, k[0].mean[c], k[0].scale[c], k[0].shift[c]) +
         normalize(x2, k[1].mean[c], k[1].scale[c], k[1].shift[c]);
}

// Loads the x of elements [e, e + kBlock) and makes their d.
template <int kSides, Activation kA, bool kPlane, class S>
BRAZE_TARGET inline void gradient_block(const GradientSource<S>& a, const uint8_t* bits, int64_t e,
                                        const BackwardConstants<float>& k, int64_t column,
                                        float (*x)[kBlock], float* d) {
  prefetch_ahead(a.dy + e);
  load_block(a.dy + e, d);
  if (a.dy2 != nullptr) {
    float other[kBlock];
    load_block(a.dy2 + e, other);
#pragma omp simd
    for (int64_t l = 0; l < kBlock; ++l) d[l] += other[l];
    if constexpr (!std::is_same_v<S, float>) {
      S sum[kBlock];
      store_block(d, sum);
      load_block(sum, d);
    }
  }
#pragma GCC unroll 2
  for (int side = 0; side < kSides; ++side) {
    prefetch_ahead(a.x[side] + e);
    load_block(a.x[side] + e, x[side]);
  }
  if constexpr (kSides == 1) {
    masked_block(bits, a.upper, a.lower, d);
  } else if constexpr (kNeedsZ<kA>) {
#pragma omp simd
    for (int64_t l = 0; l < kBlock; ++l) {
      const int64_t c = kPlane ? 0 : column + l;
      d[l] = activation_gradient<kA>(d[l], sum_of_inputs(x[0][l], x[1][l], k.input, c), 0.0f);
    }
  }
}

// The sums of `kCount` rows by column, in the order of add_gradient_columns.
template <int kSides, Activation kA, int kCount, class S>
BRAZE_TARGET void add_block_columns(const GradientSource<S>& a, int64_t e, int64_t stride,
                                    int64_t n, const BackwardConstants<float>& k,
                                    const GradientSums<float>& sums) {
  for (int64_t j = 0; j < n; j += kBlock) {
    float g[kBlock] = {}, i[kSides][kBlock] = {}, d[kCount][kBlock];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const int64_t at = e + r * stride + j;
      float x[kSides][kBlock];
      gradient_block<kSides, kA, false>(a, moved(a.mask, at / kByte), at, k, j, x, d[r]);
#pragma omp simd
      for (int64_t l = 0; l < kBlock; ++l) {
        add_gradient(d[r][l], x[0][l], k.input[0].mean[j + l], g[l], i[0][l]);
      }
      if constexpr (kSides == 2) {
        float unused[kBlock] = {};
#pragma omp simd
        for (int64_t l = 0; l < kBlock; ++l) {
          add_gradient(d[r][l], x[1][l], k.input[1].mean[j + l], unused[l], i[1][l]);
        }
      }
    }
    // After all loads: one whose address agrees in its last 12 bits waits for the store.
    if (a.kept != nullptr) {
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) store_block(d[r], a.kept + e + r * stride + j);
    }
#pragma omp simd
    for (int64_t l = 0; l < kBlock; ++l) sums.grad[j + l] += g[l];
#pragma GCC unroll 2
    for (int side = 0; side < kSides; ++side) {
#pragma omp simd
      for (int64_t l = 0; l < kBlock; ++l) sums.input[side][j + l] += i[side][l];
    }
  }
}

// Adds the gradients of a plane's last `n` elements, fewer than a block, to the sums, lane by lane.
template <int kSides, Activation kA, class S>
BRAZE_TARGET inline void add_rest(const GradientSource<S>& a, const uint8_t* bits, int64_t e,
                                  int64_t n, const BackwardConstants<float>& k,
                                  const GradientSums<float>& sums) {
  for (int64_t l = 0; l < n; ++l, ++e) {
    float d = from_storage(a.dy[e]), x[kSides], unused = 0;
    if (a.dy2 != nullptr) {
      S sum;
      to_storage(d + from_storage(a.dy2[e]), sum);
      d = from_storage(sum);
    }
    for (int side = 0; side < kSides; ++side) x[side] = from_storage(a.x[side][e]);
    if constexpr (kSides == 1) {
      const bool bit = bits[l / kByte] >> (l % kByte) & 1;
      d = two_slope_gradient(d, bit, a.upper, a.lower);
    } else {
      d = activation_gradient<kA>(d, sum_of_inputs(x[0], x[1], k.input, 0), 0.0f);
    }
    if (a.kept != nullptr) to_storage(d, a.kept[e]);
    add_gradient(d, x[0], *k.input[0].mean, sums.grad[l], sums.input[0][l]);
    if constexpr (kSides == 2) {
      add_gradient(d, x[1], *k.input[1].mean, unused, sums.input[1][l]);
    }
  }
}

template <int kSides, Activation kA, class S>
BRAZE_TARGET inline void add_plane_block(const GradientSource<S>& a, const uint8_t* bits, int64_t e,
                                         const BackwardConstants<float>& k,
                                         const GradientSums<float>& sums) {
  float d[kBlock], x[kSides][kBlock];
  gradient_block<kSides, kA, true>(a, bits, e, k, 0, x, d);
#pragma omp simd
  for (int64_t l = 0; l < kBlock; ++l) {
    add_gradient(d[l], x[0][l], *k.input[0].mean, sums.grad[l], sums.input[0][l]);
  }
  if constexpr (kSides == 2) {
    float unused[kBlock] = {};
#pragma omp simd
    for (int64_t l = 0; l < kBlock; ++l) {
      add_gradient(d[l], x[1][l], *k.input[1].mean, unused[l], sums.input[1][l]);
    }
  }
  if (a.kept != nullptr) store_block(d, a.kept + e);
}

// The sums of a plane by lane, in the order of add_gradients_of_planes.
template <int kSides, Activation kA, class S>
BRAZE_TARGET void add_block_plane(const GradientSource<S>& a, const uint8_t* bits, int64_t e,
                                  int64_t n, const BackwardConstants<float>& k,
                                  const GradientSums<float>& sums) {
  // Local, for registers: through memory takes longer than an addition.
  float grad[kLanes], input[kSides][kLanes];
  std::memcpy(grad, sums.grad, sizeof grad);
  for (int s = 0; s < kSides; ++s) std::memcpy(input[s], sums.input[s], sizeof grad);
  const GradientSums<float> local = {grad, {input[0], input[kSides - 1]}};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    add_plane_block<kSides, kA>(a, moved(bits, j / kByte), e + j, k, local);
    const int64_t second = j + kBlock;
    add_plane_block<kSides, kA>(a, moved(bits, second / kByte), e + second, k, local.at(kBlock));
  }
  if (j + kBlock <= n) {
    add_plane_block<kSides, kA>(a, moved(bits, j / kByte), e + j, k, local);
    j += kBlock;
  }
  add_rest<kSides, kA>(a, moved(bits, j / kByte), e + j, n - j, k, local.at(j % kLanes));
  std::memcpy(sums.grad, grad, sizeof grad);
  for (int s = 0; s < kSides; ++s) std::memcpy(sums.input[s], input[s], sizeof grad);
}

// dx and dx2 of `kCount` rows. All of a block is read before anything is written: dx may be dy.
template <int kCount, bool kPlane, Activation kA, bool kFrozen, class S>
BRAZE_TARGET void input_gradient_blocks(const BackwardArgs& a, int64_t e, int64_t stride, int64_t n,
                                        const BackwardConstants<float>& k) {
  const GradientSource<S> source = gradient_source<S>(a, nullptr);
  S* const dx[2] = {static_cast<S*>(a.grad[0].dx), static_cast<S*>(a.grad[1].dx)};
  for (int64_t j = 0; j < n; j += kBlock) {
    float d[kCount][kBlock], x[kCount][2][kBlock];
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      gradient_block<2, kA, kPlane>(source, nullptr, e + r * stride + j, k, j, x[r], d[r]);
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
        const float *mean = k.input[side].mean, *on_grad = k.on_grad[side];
        const float *on_input = k.on_input[side], *constant = k.constant[side];
        float* out = x[r][side];
#pragma omp simd
        for (int64_t l = 0; l < kBlock; ++l) {
          const int64_t c = kPlane ? 0 : j + l;
          out[l] = kFrozen ? input_gradient(d[r][l], on_grad[c])
                           : input_gradient(d[r][l], out[l], mean[c], on_grad[c], on_input[c],
                                            constant[c]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
        S* out = dx[side] + e + r * stride + j;
        prefetch_ahead(out);
        store_block(x[r][side], out);
      }
    }
  }
}

}  // namespace BRAZE_ISA
