// RMSprop.
#pragma once
#include "rule.h"

namespace braze {

struct Rmsprop : RuleDefaults {
  static constexpr const char* kName = "rmsprop";
  static constexpr int kStates = 3;
  static constexpr const char* kStateNames[kStates] = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr bool kCountsSteps = true;  // as torch's, though no formula reads the count

  static constexpr uint32_t kMomentum = kRuleFlag, kCentered = kRuleFlag << 1;
  static constexpr uint32_t kFlags = kMomentum | kCentered, kRareFlags = kCentered;

  struct Options {
    double lr, alpha, eps, weight_decay, momentum, l1;
    double sign;  // -1 to maximize
    bool centered;
  };
  static constexpr Field kFields[] = {
      {"lr", offsetof(Options, lr), Field::device_number},
      {"alpha", offsetof(Options, alpha), Field::number},
      {"eps", offsetof(Options, eps), Field::number},
      {"weight_decay", offsetof(Options, weight_decay), Field::device_number},
      {"momentum", offsetof(Options, momentum), Field::device_number},
      {"l1", offsetof(Options, l1), Field::optional_number},
      {"maximize", offsetof(Options, sign), Field::sign},
      {"centered", offsetof(Options, centered), Field::flag},
  };

  static constexpr BRAZE_INLINE uint32_t flags(const Options& o) {
    return (o.momentum != 0 ? kMomentum : 0) | (o.centered ? kCentered : 0);
  }
  static constexpr BRAZE_INLINE bool uses(uint32_t flags, int k) {
    return k == 0 || (flags & (k == 1 ? kMomentum : kCentered));
  }

  template <class T>
  struct Args {
    T grad_scale, fold_weight;
    T l2, l1;
    T alpha, one_minus_alpha;
    T eps, momentum, lr;
  };
  template <class Power>
  static BRAZE_INLINE Args<double> args(const Options& o, const StepInputs& in, Power&&) {
    return {.grad_scale = o.sign * in.grad_scale,
            .fold_weight = in.fold_weight,
            .l2 = o.weight_decay,
            .l1 = o.l1,
            .alpha = o.alpha,
            .one_minus_alpha = 1 - o.alpha,
            .eps = o.eps,
            .momentum = o.momentum,
            .lr = o.lr};
  }

  // v = alpha v + (1 - alpha) g^2;  a = alpha a + (1 - alpha) g;
  // d = g / (sqrt(centered ? v - a^2 : v) + eps);  b = mu b + d;  p = p - lr (momentum ? b : d).
  template <class V, class T>
  static BRAZE_INLINE void update(V& p, V g, V& v, V& buffer, V& average, const Args<T>& a,
                                  uint32_t flags) {
    g = effective_gradient(g, p, a, flags);
    v = fused_multiply_add(V(a.alpha), v, V(a.one_minus_alpha) * g * g);
    V second = v;
    if (flags & kCentered) {
      average = fused_multiply_add(V(a.alpha), average, V(a.one_minus_alpha) * g);
      second = v - average * average;
      // Rounding may take what is a variance below zero. A NaN stays.
      second = select(second < V(0), V(0), second);
    }
    V direction = g / (square_root(second) + V(a.eps));
    if (flags & kMomentum) {
      direction = buffer = fused_multiply_add(V(a.momentum), buffer, direction);
    }
    p = fused_multiply_add(V(-a.lr), direction, p);
  }
};

}  // namespace braze
