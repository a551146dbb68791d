// The loop over [begin, end) of one tensor that serves every rule, compiled once per instruction
// set: optimizer_cpu.cpp includes this file with BRAZE_ISA (a namespace) and BRAZE_TARGET (a
// function attribute) set. Dense fp32 and fp64 run straight over memory, dense 16-bit operands in
// blocks that stay in registers, everything else through small tiles.

#include "operands.inl"

namespace BRAZE_ISA {

// The gradient to apply: grad, the accumulator, or accumulator + weight * grad.
template <class Rule, class T>
BRAZE_TARGET const T* open_gradient(const TensorWork& t, View<T>& view, View<T>& sum_view,
                                    int64_t begin, int64_t n,
                                    const typename Rule::template Args<T>& a) {
  if constexpr (Rule::kUpdatesParam) {
    if (t.sum.data != nullptr) {
      const T* sum = sum_view.open(t, t.sum, begin, n, true);
      if (t.grad.data == nullptr) return sum;
      const T* grad = view.open(t, t.grad, begin, n, true);
      T* out = sum_view.scratch();
      for (int64_t i = 0; i < n; ++i) {
        out[i] = accumulate_gradient(sum[i], grad[i], a.fold_weight, T(1), false);
      }
      return out;
    }
  }
  return view.open(t, t.grad, begin, n, true);
}

// Element j of each of a block's states.
template <class T>
struct Lane {
  T* const* blocks;
  int64_t j;
  BRAZE_INLINE T& operator[](size_t k) const { return blocks[k][j]; }
};

template <class Rule, uint32_t kFlags>
constexpr bool kUses(int k) {
  return k < Rule::kStates && Rule::uses(kFlags, k);
}
// A state that is overwritten is never read: it may hold anything.
template <class Rule, uint32_t kFlags>
constexpr bool kReads(int k) {
  return kUses<Rule, kFlags>(k) && !(kFlags & kFirst);
}

// True if every operand is a dense array of `dtype`: one loop straight over memory.
template <class Rule, uint32_t kFlags>
bool uniform(const TensorWork& t, DType dtype) {
  bool result = t.linear && t.grad.data != nullptr && t.sum.data == nullptr &&
                t.param.dtype == dtype && t.grad.dtype == dtype;
  for (int k = 0; k < kMaxStates; ++k) {
    result = result && (!kUses<Rule, kFlags>(k) || t.state[k].dtype == dtype);
  }
  return result;
}

// The states as parameters of their own, because `restrict` holds for nothing else. S is what
// memory holds, T what the arithmetic uses.
template <class Rule, uint32_t kFlags, class S, class T>
BRAZE_TARGET void loop(S* __restrict p, const S* __restrict g, S* __restrict s0, S* __restrict s1,
                       S* __restrict s2, int64_t n,
                       const typename Rule::template Args<T>& arguments) {
  constexpr auto uses = kUses<Rule, kFlags>;
  constexpr auto reads = kReads<Rule, kFlags>;
  const typename Rule::template Args<T> a = arguments;
  int64_t i = 0;
  if constexpr (!std::is_same_v<S, T>) {
    for (; i + kBlock <= n; i += kBlock) {
      alignas(64) T param[kBlock], grad[kBlock], b0[kBlock], b1[kBlock], b2[kBlock];
      if constexpr (uses(1)) {
        constexpr int64_t kAhead = 512;  // conversions keep the core too busy to look ahead itself
        __builtin_prefetch(p + i + kAhead, 1);
        __builtin_prefetch(g + i + kAhead);
        __builtin_prefetch(s0 + i + kAhead, 1);
        __builtin_prefetch(s1 + i + kAhead, 1);
      }
      if constexpr (Rule::kUpdatesParam) load_block(p + i, param);
      load_block(g + i, grad);
      if constexpr (reads(0)) load_block(s0 + i, b0);
      if constexpr (reads(1)) load_block(s1 + i, b1);
      if constexpr (reads(2)) load_block(s2 + i, b2);
      T* const blocks[] = {b0, b1, b2};
#pragma omp simd
      for (int64_t j = 0; j < kBlock; ++j) {
        update_element<Rule>(param[j], grad[j], Lane<T>{blocks, j}, a, kFlags);
      }
      if constexpr (Rule::kUpdatesParam) store_block(param, p + i);
      if constexpr (uses(0)) store_block(b0, s0 + i);
      if constexpr (uses(1)) store_block(b1, s1 + i);
      if constexpr (uses(2)) store_block(b2, s2 + i);
    }
  }
  for (; i < n; ++i) {
    T param = T(0), own[kMaxStates] = {};
    if constexpr (Rule::kUpdatesParam) param = from_storage(p[i]);
    if constexpr (reads(0)) own[0] = from_storage(s0[i]);
    if constexpr (reads(1)) own[1] = from_storage(s1[i]);
    if constexpr (reads(2)) own[2] = from_storage(s2[i]);
    update_element<Rule>(param, T(from_storage(g[i])), own, a, kFlags);
    if constexpr (Rule::kUpdatesParam) to_storage(param, p[i]);
    if constexpr (uses(0)) to_storage(own[0], s0[i]);
    if constexpr (uses(1)) to_storage(own[1], s1[i]);
    if constexpr (uses(2)) to_storage(own[2], s2[i]);
  }
}

template <class Rule, uint32_t kFlags, class S, class T>
BRAZE_TARGET bool run_uniform(const TensorWork& t, int64_t begin, int64_t end,
                              const typename Rule::template Args<T>& a) {
  if (!uniform<Rule, kFlags>(t, kDTypeOf<S>)) return false;
  S* states[kMaxStates];
  for (int k = 0; k < kMaxStates; ++k) {
    states[k] = kUses<Rule, kFlags>(k) ? at<S>(t.state[k], begin) : nullptr;
  }
  loop<Rule, kFlags, S, T>(at<S>(t.param, begin), at<S>(t.grad, begin), states[0], states[1],
                           states[2], end - begin, a);
  return true;
}

template <class Rule, uint32_t kFlags, class T>
BRAZE_TARGET void run_tiles(const TensorWork& t, int64_t begin, int64_t end,
                            const typename Rule::template Args<T>& a) {
  View<T> param, grad, sum, state[Rule::kStates];
  for (; begin < end; begin += kTile) {
    const int64_t n = std::min(kTile, end - begin);
    const T* g = open_gradient<Rule>(t, grad, sum, begin, n, a);
    T* p = Rule::kUpdatesParam ? param.open(t, t.param, begin, n, true) : nullptr;
    T* s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k) {
      if (!kUses<Rule, kFlags>(k)) continue;
      s[k] = state[k].open(t, t.state[k], begin, n, kReads<Rule, kFlags>(k));
    }
    loop<Rule, kFlags, T, T>(p, g, s[0], s[1], s[2], n, a);
    if constexpr (Rule::kUpdatesParam) param.close(t, t.param, begin, n);
    for (int k = 0; k < Rule::kStates; ++k) {
      if (kUses<Rule, kFlags>(k)) state[k].close(t, t.state[k], begin, n);
    }
  }
}

template <class Rule, uint32_t kFlags, class T>
BRAZE_TARGET void run_range(const TensorWork& t, int64_t begin, int64_t end,
                            const typename Rule::template Args<T>& a) {
  if (run_uniform<Rule, kFlags, T, T>(t, begin, end, a)) return;
  if constexpr (std::is_same_v<T, float> && Rule::kUpdatesParam) {
    if (run_uniform<Rule, kFlags, Bf16, T>(t, begin, end, a)) return;
    if (run_uniform<Rule, kFlags, F16, T>(t, begin, end, a)) return;
  }
  run_tiles<Rule, kFlags, T>(t, begin, end, a);
}

template <class Rule>
constexpr bool occurs(uint32_t flags) {
  const uint32_t known =
      Rule::kFlags | (Rule::kUpdatesParam ? kPenalty : 0u) | (Rule::kFirstOverwrites ? kFirst : 0u);
  return (flags & ~known) == 0 && Rule::occurs(flags);
}

// The flags become constants: one loop for each combination.
template <class Rule, class T, uint32_t kFlags = 0>
BRAZE_TARGET void run_flags(const TensorWork& t, int64_t begin, int64_t end, uint32_t flags,
                            const typename Rule::template Args<T>& a) {
  if constexpr (occurs<Rule>(kFlags)) {
    if (flags == kFlags) return run_range<Rule, kFlags, T>(t, begin, end, a);
  }
  if constexpr (kFlags + 1 < kAllFlags) run_flags<Rule, T, kFlags + 1>(t, begin, end, flags, a);
}

// hypers: Hyper<Rule>[].
template <class Rule>
void update(const TensorWork& t, int64_t begin, int64_t end, const void* hypers) {
  const Hyper<Rule>& h = static_cast<const Hyper<Rule>*>(hypers)[t.hyper];
  const uint32_t flags =
      h.flags | (Rule::kFirstOverwrites && t.first && Rule::uses(h.flags, 0) ? kFirst : 0u);
  if (t.is_double) {
    run_flags<Rule, double>(t, begin, end, flags, h.d);
  } else {
    run_flags<Rule, float>(t, begin, end, flags, h.f);
  }
}

// [index in Rules]
template <class List>
struct Table;
template <class... Rule>
struct Table<RuleList<Rule...>> {
  static constexpr Update kUpdates[] = {update<Rule>...};
};

}  // namespace BRAZE_ISA
