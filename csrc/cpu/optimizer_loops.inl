// The loops over [begin, end) of one tensor, compiled once per instruction set: optimizer_cpu.cpp
// includes this file with BRAZE_ISA (a namespace) and BRAZE_TARGET (a function attribute) set.
// Dense fp32 and fp64 run straight over memory, dense 16-bit operands in blocks that stay in
// registers, everything else through small tiles.

#include "operands.inl"

namespace BRAZE_ISA {

// The gradient to apply: grad, the accumulator, or accumulator + weight * grad.
template <class T>
BRAZE_TARGET const T* open_gradient(const TensorWork& t, View<T>& view, View<T>& sum_view,
                                    int64_t begin, int64_t n, T weight) {
  if (t.sum.data == nullptr) return view.open(t, t.grad, begin, n, true);
  const T* sum = sum_view.open(t, t.sum, begin, n, true);
  if (t.grad.data == nullptr) return sum;
  const T* grad = view.open(t, t.grad, begin, n, true);
  T* out = sum_view.scratch();
  for (int64_t i = 0; i < n; ++i) {
    out[i] = accumulate_gradient(sum[i], grad[i], weight, T(1), false);
  }
  return out;
}

// True if every operand is a dense array of `dtype`: one loop straight over memory.
inline bool uniform(const TensorWork& t, int num_states, DType dtype) {
  bool result = t.linear && t.grad.data != nullptr && t.sum.data == nullptr &&
                t.param.dtype == dtype && t.grad.dtype == dtype;
  for (int k = 0; k < num_states; ++k) result = result && t.state[k].dtype == dtype;
  return result;
}

// S is what memory holds, T what the arithmetic uses.
template <class S, class T, bool kPenalty, bool kAmsgrad>
BRAZE_TARGET void adam_loop(S* __restrict p, const S* __restrict g, S* __restrict m,
                            S* __restrict v, S* __restrict v_max, int64_t n,
                            const AdamArgs<T>& args) {
  const AdamArgs<T> a = args;
  int64_t i = 0;
  if constexpr (!std::is_same_v<S, T>) {
    for (; i + kBlock <= n; i += kBlock) {
      alignas(64) T param[kBlock], grad[kBlock], first[kBlock], second[kBlock], largest[kBlock];
      constexpr int64_t kAhead = 512;  // conversions keep the core too busy to look ahead itself
      __builtin_prefetch(p + i + kAhead, 1);
      __builtin_prefetch(g + i + kAhead);
      __builtin_prefetch(m + i + kAhead, 1);
      __builtin_prefetch(v + i + kAhead, 1);
      load_block(p + i, param);
      load_block(g + i, grad);
      load_block(m + i, first);
      load_block(v + i, second);
      if constexpr (kAmsgrad) load_block(v_max + i, largest);
#pragma omp simd
      for (int64_t k = 0; k < kBlock; ++k) {
        adam_update(param[k], grad[k], first[k], second[k], largest[k], a, kPenalty, kAmsgrad);
      }
      store_block(param, p + i);
      store_block(first, m + i);
      store_block(second, v + i);
      if constexpr (kAmsgrad) store_block(largest, v_max + i);
    }
  }
  for (; i < n; ++i) {
    T param = from_storage(p[i]), first = from_storage(m[i]), second = from_storage(v[i]);
    T largest = T(0);
    if constexpr (kAmsgrad) largest = from_storage(v_max[i]);
    adam_update(param, T(from_storage(g[i])), first, second, largest, a, kPenalty, kAmsgrad);
    to_storage(param, p[i]);
    to_storage(first, m[i]);
    to_storage(second, v[i]);
    if constexpr (kAmsgrad) to_storage(largest, v_max[i]);
  }
}

template <class S, class T, bool kPenalty, bool kAmsgrad>
BRAZE_TARGET void adam_uniform(const TensorWork& t, const AdamArgs<T>& a, int64_t begin,
                               int64_t end) {
  adam_loop<S, T, kPenalty, kAmsgrad>(
      at<S>(t.param, begin), at<S>(t.grad, begin), at<S>(t.state[0], begin),
      at<S>(t.state[1], begin), kAmsgrad ? at<S>(t.state[2], begin) : nullptr, end - begin, a);
}

template <class T, bool kPenalty, bool kAmsgrad>
BRAZE_TARGET void adam_range(const TensorWork& t, const AdamArgs<T>& a, int64_t begin,
                             int64_t end) {
  constexpr int kStates = kAmsgrad ? 3 : 2;
  if (uniform(t, kStates, View<T>::kDType)) {
    adam_uniform<T, T, kPenalty, kAmsgrad>(t, a, begin, end);
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (uniform(t, kStates, DType::bf16)) {
      adam_uniform<Bf16, T, kPenalty, kAmsgrad>(t, a, begin, end);
      return;
    }
    if (uniform(t, kStates, DType::f16)) {
      adam_uniform<F16, T, kPenalty, kAmsgrad>(t, a, begin, end);
      return;
    }
  }
  View<T> param, grad, sum, state[kStates];
  for (; begin < end; begin += kTile) {
    const int64_t n = std::min(kTile, end - begin);
    const T* g = open_gradient<T>(t, grad, sum, begin, n, a.fold_weight);
    T* p = param.open(t, t.param, begin, n, true);
    T* s[3] = {nullptr, nullptr, nullptr};
    for (int k = 0; k < kStates; ++k) s[k] = state[k].open(t, t.state[k], begin, n, true);
    adam_loop<T, T, kPenalty, kAmsgrad>(p, g, s[0], s[1], s[2], n, a);
    param.close(t, t.param, begin, n);
    for (int k = 0; k < kStates; ++k) state[k].close(t, t.state[k], begin, n);
  }
}

template <class T>
BRAZE_TARGET void adam_chunk(const TensorWork& t, const AdamHyper& h, const AdamArgs<T>& a,
                             int64_t begin, int64_t end) {
  if (h.amsgrad) {
    h.penalty ? adam_range<T, true, true>(t, a, begin, end)
              : adam_range<T, false, true>(t, a, begin, end);
  } else {
    h.penalty ? adam_range<T, true, false>(t, a, begin, end)
              : adam_range<T, false, false>(t, a, begin, end);
  }
}

void adam(const TensorWork& t, const AdamHyper& h, int64_t begin, int64_t end) {
  t.is_double ? adam_chunk(t, h, h.d, begin, end) : adam_chunk(t, h, h.f, begin, end);
}

template <class S, class T, Momentum kMomentum, bool kNesterov, bool kPenalty>
BRAZE_TARGET void sgd_loop(S* __restrict p, const S* __restrict g, S* __restrict buffer, int64_t n,
                           const SgdArgs<T>& args) {
  const SgdArgs<T> a = args;
  int64_t i = 0;
  if constexpr (!std::is_same_v<S, T>) {
    for (; i + kBlock <= n; i += kBlock) {
      alignas(64) T param[kBlock], grad[kBlock], momentum[kBlock];
      load_block(p + i, param);
      load_block(g + i, grad);
      if constexpr (kMomentum == Momentum::running) load_block(buffer + i, momentum);
#pragma omp simd
      for (int64_t k = 0; k < kBlock; ++k) {
        sgd_update(param[k], grad[k], momentum[k], a, kMomentum, kNesterov, kPenalty);
      }
      store_block(param, p + i);
      if constexpr (kMomentum != Momentum::none) store_block(momentum, buffer + i);
    }
  }
  for (; i < n; ++i) {
    T param = from_storage(p[i]);
    T momentum = T(0);
    // A first buffer is never read: it may hold anything.
    if constexpr (kMomentum == Momentum::running) momentum = from_storage(buffer[i]);
    sgd_update(param, T(from_storage(g[i])), momentum, a, kMomentum, kNesterov, kPenalty);
    to_storage(param, p[i]);
    if constexpr (kMomentum != Momentum::none) to_storage(momentum, buffer[i]);
  }
}

template <class S, class T, Momentum kMomentum, bool kNesterov, bool kPenalty>
BRAZE_TARGET void sgd_uniform(const TensorWork& t, const SgdArgs<T>& a, int64_t begin,
                              int64_t end) {
  S* buffer = kMomentum != Momentum::none ? at<S>(t.state[0], begin) : nullptr;
  sgd_loop<S, T, kMomentum, kNesterov, kPenalty>(at<S>(t.param, begin), at<S>(t.grad, begin),
                                                 buffer, end - begin, a);
}

template <class T, Momentum kMomentum, bool kNesterov, bool kPenalty>
BRAZE_TARGET void sgd_range(const TensorWork& t, const SgdArgs<T>& a, int64_t begin, int64_t end) {
  constexpr bool kBuffer = kMomentum != Momentum::none;
  if (uniform(t, kBuffer ? 1 : 0, View<T>::kDType)) {
    sgd_uniform<T, T, kMomentum, kNesterov, kPenalty>(t, a, begin, end);
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (uniform(t, kBuffer ? 1 : 0, DType::bf16)) {
      sgd_uniform<Bf16, T, kMomentum, kNesterov, kPenalty>(t, a, begin, end);
      return;
    }
    if (uniform(t, kBuffer ? 1 : 0, DType::f16)) {
      sgd_uniform<F16, T, kMomentum, kNesterov, kPenalty>(t, a, begin, end);
      return;
    }
  }
  View<T> param, grad, sum, state;
  for (; begin < end; begin += kTile) {
    const int64_t n = std::min(kTile, end - begin);
    const T* g = open_gradient<T>(t, grad, sum, begin, n, a.fold_weight);
    T* p = param.open(t, t.param, begin, n, true);
    T* buffer =
        kBuffer ? state.open(t, t.state[0], begin, n, kMomentum == Momentum::running) : nullptr;
    sgd_loop<T, T, kMomentum, kNesterov, kPenalty>(p, g, buffer, n, a);
    param.close(t, t.param, begin, n);
    if (kBuffer) state.close(t, t.state[0], begin, n);
  }
}

template <class T, Momentum kMomentum, bool kNesterov>
BRAZE_TARGET void sgd_penalty(const TensorWork& t, const SgdHyper& h, const SgdArgs<T>& a,
                              int64_t begin, int64_t end) {
  h.penalty ? sgd_range<T, kMomentum, kNesterov, true>(t, a, begin, end)
            : sgd_range<T, kMomentum, kNesterov, false>(t, a, begin, end);
}

template <class T>
BRAZE_TARGET void sgd_chunk(const TensorWork& t, const SgdHyper& h, const SgdArgs<T>& a,
                            int64_t begin, int64_t end) {
  if (!h.has_momentum) {
    sgd_penalty<T, Momentum::none, false>(t, h, a, begin, end);
  } else if (t.first) {
    h.nesterov ? sgd_penalty<T, Momentum::first, true>(t, h, a, begin, end)
               : sgd_penalty<T, Momentum::first, false>(t, h, a, begin, end);
  } else {
    h.nesterov ? sgd_penalty<T, Momentum::running, true>(t, h, a, begin, end)
               : sgd_penalty<T, Momentum::running, false>(t, h, a, begin, end);
  }
}

void sgd(const TensorWork& t, const SgdHyper& h, int64_t begin, int64_t end) {
  t.is_double ? sgd_chunk(t, h, h.d, begin, end) : sgd_chunk(t, h, h.f, begin, end);
}

template <class T>
BRAZE_TARGET void fold_range(const TensorWork& t, T weight, T keep, int64_t begin, int64_t end) {
  View<T> grad_view, sum_view;
  for (; begin < end; begin += kTile) {
    const int64_t n = std::min(kTile, end - begin);
    const T* __restrict g = grad_view.open(t, t.grad, begin, n, true);
    T* __restrict sum = sum_view.open(t, t.state[0], begin, n, !t.first);
    if (t.first) {
      for (int64_t i = 0; i < n; ++i) {
        sum[i] = accumulate_gradient(T(0), g[i], weight, keep, true);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        sum[i] = accumulate_gradient(sum[i], g[i], weight, keep, false);
      }
    }
    sum_view.close(t, t.state[0], begin, n);
  }
}

void fold(const TensorWork& t, const FoldHyper& h, int64_t begin, int64_t end) {
  if (t.is_double) {
    fold_range<double>(t, h.weight, h.keep, begin, end);
  } else {
    fold_range<float>(t, static_cast<float>(h.weight), static_cast<float>(h.keep), begin, end);
  }
}

}  // namespace BRAZE_ISA
