// Gradient accumulation: no optimizer's rule, but the same pass over tensors.
#pragma once
#include "rule.h"

namespace braze {

struct Fold : RuleDefaults {
  static constexpr const char* kName = "fold";
  static constexpr bool kIsOptimizer = false;
  static constexpr bool kUpdatesParam = false;
  static constexpr int kStates = 1;
  static constexpr const char* kStateNames[kStates] = {"grad_sum"};
  static constexpr bool kFirstOverwrites = true;

  struct Options {
    double weight;
    double keep;  // what multiplies the sum so far
  };
  static constexpr Field kFields[] = {{"weight", offsetof(Options, weight), Field::number},
                                      {"keep", offsetof(Options, keep), Field::number}};
  static constexpr BRAZE_INLINE uint32_t flags(const Options&) { return 0; }
  static constexpr BRAZE_INLINE bool uses(uint32_t, int) { return true; }

  template <class T>
  struct Args {
    T weight, keep;
  };
  template <class Power>
  static BRAZE_INLINE Args<double> args(const Options& o, const StepInputs&, Power&&) {
    return {.weight = o.weight, .keep = o.keep};
  }

  template <class V, class T>
  static BRAZE_INLINE void update(V&, V g, V& sum, const Args<T>& a, uint32_t flags) {
    sum = accumulate_gradient(sum, g, a.weight, a.keep, flags & kFirst);
  }
};

}  // namespace braze
