// d where the forward left a mask, as it does for relu(bn(x) + residual): read, kept and summed in
// one pass, a block of 16 elements at a time. Included once per instruction set.

namespace BRAZE_ISA {

// What memory holds of the gradient of y, and where. dy2, kept: may be null.
template <class S>
struct MaskedGradient {
  const S* dy;
  const S* dy2;
  const S* x;
  S* kept;
  float upper, lower;  // slopes
  MaskedGradient at(int64_t e) const {
    return {dy + e, moved(dy2, e), x + e, moved(kept, e), upper, lower};
  }
};

// d of a block, from the bits of its elements.
template <class S>
BRAZE_TARGET inline void gradient_block(const MaskedGradient<S>& a, const uint8_t* bits, int64_t e,
                                        float* d) {
  load_block(a.dy + e, d);
  if (a.dy2 != nullptr) {
    float other[kBlock];
    load_block(a.dy2 + e, other);
#pragma omp simd
    for (int64_t k = 0; k < kBlock; ++k) d[k] += other[k];
  }
  masked_block(bits, a.upper, a.lower, d);
}

// The sums of `kCount` rows by column, in the order of add_gradient_columns.
template <int kCount, class S>
BRAZE_TARGET void add_masked_columns(const MaskedGradient<S>& a, const uint8_t* mask, int64_t e,
                                     int64_t stride, int64_t n, const float* mean, float* grad,
                                     float* grad_input) {
  for (int64_t j = 0; j < n; j += kBlock) {
    float g[kBlock] = {}, i[kBlock] = {}, d[kCount][kBlock];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const int64_t at = e + r * stride + j;
      float value[kBlock];
      gradient_block(a, mask + at / kByte, at, d[r]);
      load_block(a.x + at, value);
#pragma omp simd
      for (int64_t k = 0; k < kBlock; ++k) add_gradient(d[r][k], value[k], mean[j + k], g[k], i[k]);
    }
    // After all loads: one whose address agrees in its last 12 bits waits for the store.
    if (a.kept != nullptr) {
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) store_block(d[r], a.kept + e + r * stride + j);
    }
#pragma omp simd
    for (int64_t k = 0; k < kBlock; ++k) {
      grad[j + k] += g[k];
      grad_input[j + k] += i[k];
    }
  }
}

// Those of `n` elements, fewer than a block.
template <class S>
BRAZE_TARGET inline void add_masked_rest(const MaskedGradient<S>& a, const uint8_t* bits, int64_t n,
                                         float mean, float* grad, float* grad_input) {
  for (int64_t k = 0; k < n; ++k) {
    float d = from_storage(a.dy[k]);
    if (a.dy2 != nullptr) d += from_storage(a.dy2[k]);
    const bool bit = bits[k / kByte] >> (k % kByte) & 1;
    d = two_slope_gradient(d, bit, a.upper, a.lower);
    if (a.kept != nullptr) to_storage(d, a.kept[k]);
    add_gradient(d, float(from_storage(a.x[k])), mean, grad[k], grad_input[k]);
  }
}

// The sums of a plane by lane, in the order of add_gradients_of_planes.
template <class S>
BRAZE_TARGET void add_masked_plane(const MaskedGradient<S>& a, const uint8_t* bits, int64_t n,
                                   float mean, float* grads, float* grad_inputs) {
  int64_t j = 0;
  for (; j + kBlock <= n; j += kBlock) {
    float d[kBlock], value[kBlock];
    gradient_block(a, bits + j / kByte, j, d);
    load_block(a.x + j, value);
    float *g = grads + j % kLanes, *i = grad_inputs + j % kLanes;
#pragma omp simd
    for (int64_t k = 0; k < kBlock; ++k) add_gradient(d[k], value[k], mean, g[k], i[k]);
    if (a.kept != nullptr) store_block(d, a.kept + j);
  }
  const int64_t lane = j % kLanes;
  add_masked_rest(a.at(j), bits + j / kByte, n - j, mean, grads + lane, grad_inputs + lane);
}

}  // namespace BRAZE_ISA
