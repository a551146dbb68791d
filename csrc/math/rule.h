// What an optimizer's rule is made of. A rule is one struct that CPU loops, CUDA kernels and the
// code around them share: adam.h and its neighbours, listed in rules.h.
// Only IEEE operations and explicit fma: the same bits everywhere, as long as the compiler
// contracts nothing (-ffp-contract=off, -fmad=false). T is float (fp32 and 16-bit parameters) or
// double, V a T or a vector of them. Flags are plain arguments: where they are constants, the
// compiler folds them.
#pragma once
#include <cstddef>
#include <utility>

#include "arithmetic.h"

namespace braze {

// An entry of param_groups that a rule reads, and where its Options keep it.
struct Field {
  enum Kind : uint8_t {
    number,
    optional_number,  // 0 where the group has no such key
    device_number,    // may be a one-element tensor that a kernel reads when it runs
    first_of_pair,    // of betas; each is a device_number
    second_of_pair,
    flag,
    sign,  // a flag that becomes -1 or 1
  };
  const char* name;
  size_t offset;  // of a double, or of a bool for a flag
  Kind kind;

  constexpr bool may_be_on_device() const {
    return kind == device_number || kind == first_of_pair || kind == second_of_pair;
  }
};

// What decides the course of an update beside its arguments. Those of a rule itself begin at
// kRuleFlag.
enum Flag : uint32_t {
  kFirst = 1,    // the states hold nothing yet, and are overwritten
  kPenalty = 2,  // l1 or l2 is not 0
  kRuleFlag = 4,
  kAllFlags = 16,  // every combination is below
};

// What the arguments of an update depend on beside options.
struct StepInputs {
  double step = 0;         // the count after this step, in rules that count
  double grad_scale = 1;   // 1 / (loss scale * summed weights)
  double fold_weight = 1;  // weight of the gradient that joins an accumulator
  bool in_window = false;  // states[0] already has gradients of the open accumulation window in it
};

// What most rules have in common; a rule derives from it and says only what is different.
struct RuleDefaults {
  static constexpr bool kIsOptimizer = true;   // false: another pass over the same tensors
  static constexpr bool kUpdatesParam = true;  // false: nothing but its state
  static constexpr bool kCountsSteps = false;  // state['step']
  // A state that does not exist yet is overwritten by the first update, instead of being zeros.
  static constexpr bool kFirstOverwrites = false;
  // Whether zeros would do as well.
  template <class Options>
  static constexpr bool zeros_serve(const Options&) {
    return true;
  }
  // Gradients of an accumulation window may be summed up in states[0], as sum_in_state() says.
  static constexpr bool kSumsInState = false;
  static constexpr uint32_t kFlags = 0;      // its own
  static constexpr uint32_t kRareFlags = 0;  // their updates need more registers than most
  // Which combinations of flags there are: the CPU has a loop for each.
  static constexpr bool occurs(uint32_t) { return true; }
};

// Gradient penalties: l2 adds l2 * p, l1 adds l1 * sign(p), with sign(0) = 0.
template <class V, class T>
BRAZE_INLINE V add_penalty(V g, V p, T l2, T l1) {
  const V signed_l1 = select(p > V(0), V(l1), select(p < V(0), V(-l1), V(0)));
  // Not just l2 * p with l2 = 0: that would turn an infinite p into NaN.
  return (l2 != T(0) ? fused_multiply_add(V(l2), p, g) : g) + signed_l1;
}

// The gradient as the formulas take it: scaled, signed, and with its penalties.
template <class V, class Args>
BRAZE_INLINE V effective_gradient(V g, V p, const Args& a, uint32_t flags) {
  g *= a.grad_scale;
  return flags & kPenalty ? add_penalty(g, p, a.l2, a.l1) : g;
}

// sum = keep * sum + weight * g; the first micro-batch overwrites.
template <class V>
BRAZE_INLINE V accumulate_gradient(V sum, V g, Element<V> weight, Element<V> keep, bool first) {
  return first ? V(weight) * g : fused_multiply_add(V(weight), g, V(keep) * sum);
}

// base^n, n >= 0 (a fraction is dropped), in double-double: within one unit in the last place, and
// the same bits on every machine, which pow does not promise.
struct WholePower {
  BRAZE_INLINE double operator()(double base, double exponent) const {
    double high = 1, low = 0, square = base, square_low = 0;
    for (int64_t n = static_cast<int64_t>(exponent); n > 0; n >>= 1) {
      if (n & 1) {
        const double product = high * square;
        const double error =
            ::fma(high, square_low, ::fma(low, square, ::fma(high, square, -product)));
        high = product + error;
        low = error - (high - product);
      }
      const double product = square * square;
      const double error =
          ::fma(square, square_low, ::fma(square_low, square, ::fma(square, square, -product)));
      square = product + error;
      square_low = error - (square - product);
    }
    return high;
  }
};

// The same for a count with a fraction, as averaged states have: its last bit may differ between
// machines.
struct FractionalPower {
  double operator()(double base, double exponent) const { return ::pow(base, exponent); }
};

// Each member rounded once, from the double it was computed in. Args has members of T alone.
template <template <class> class Args>
BRAZE_INLINE Args<float> rounded(const Args<double>& args) {
  constexpr size_t kMembers = sizeof(Args<double>) / sizeof(double);
  static_assert(sizeof(Args<float>) == kMembers * sizeof(float));
  double wide[kMembers];
  float narrow[kMembers];
  Args<float> result;
  memcpy(wide, &args, sizeof(wide));
  for (size_t i = 0; i < kMembers; ++i) narrow[i] = static_cast<float>(wide[i]);
  memcpy(&result, narrow, sizeof(narrow));
  return result;
}

// How many fields of a rule may be in device memory, and the offset of the j-th of them.
template <class Rule>
constexpr size_t kDeviceFields = [] {
  size_t count = 0;
  for (const Field& field : Rule::kFields) count += field.may_be_on_device();
  return count;
}();

template <class Rule, size_t j>
constexpr size_t kDeviceFieldOffset = [] {
  size_t left = j;
  for (const Field& field : Rule::kFields) {
    if (field.may_be_on_device() && left-- == 0) return field.offset;
  }
  return size_t{0};
}();

// Rule::update() with one argument for each of the rule's states, states[k].
template <class Rule, class V, class Args, class States, size_t... k>
BRAZE_INLINE void update_states(V& p, V g, States&& states, const Args& a, uint32_t flags,
                                std::index_sequence<k...>) {
  Rule::update(p, g, states[k]..., a, flags);
}

template <class Rule, class V, class Args, class States>
BRAZE_INLINE void update_element(V& p, V g, States&& states, const Args& a, uint32_t flags) {
  update_states<Rule>(p, g, states, a, flags, std::make_index_sequence<Rule::kStates>{});
}

}  // namespace braze
