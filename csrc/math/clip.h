// Gradients changed where they are: no optimizer's rule, but the same pass over tensors. The tensor
// is `param` and `grad` at once.
#pragma once
#include "rule.h"

namespace braze {

struct Clip : RuleDefaults {
  static constexpr const char* kName = "clip";
  static constexpr bool kIsOptimizer = false;
  static constexpr int kStates = 1;
  static constexpr const char* kStateNames[kStates] = {"none"};

  static constexpr uint32_t kByValue = kRuleFlag;
  static constexpr uint32_t kFlags = kByValue;

  struct Options {
    double limit;  // by value: of the magnitude
    bool by_value;
  };
  static constexpr Field kFields[] = {{"limit", offsetof(Options, limit), Field::device_number},
                                      {"by_value", offsetof(Options, by_value), Field::flag}};
  static constexpr BRAZE_INLINE uint32_t flags(const Options& o) {
    return o.by_value ? kByValue : 0;
  }
  static constexpr BRAZE_INLINE bool uses(uint32_t, int) { return false; }

  template <class T>
  struct Args {
    T grad_scale;
    T fold_weight;
    T limit;
  };
  template <class Power>
  static BRAZE_INLINE Args<double> args(const Options& o, const StepInputs& in, Power&&) {
    return {.grad_scale = in.grad_scale, .fold_weight = in.fold_weight, .limit = o.limit};
  }

  template <class V, class T>
  static BRAZE_INLINE void update(V& p, V g, V&, const Args<T>& a, uint32_t flags) {
    const V limit(a.limit);
    p = flags & kByValue ? select(g > limit, limit, select(g < -limit, -limit, g))
                         : g * V(a.grad_scale);
  }
};

}  // namespace braze
