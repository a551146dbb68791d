// Lion.
#pragma once
#include "rule.h"

namespace braze {

struct Lion : RuleDefaults {
  static constexpr const char* kName = "lion";
  static constexpr int kStates = 1;
  static constexpr const char* kStateNames[kStates] = {"exp_avg"};

  struct Options {
    double lr, beta1, beta2, weight_decay, l1;
    double sign;  // -1 to maximize
  };
  static constexpr Field kFields[] = {
      {"lr", offsetof(Options, lr), Field::device_number},
      {"betas", offsetof(Options, beta1), Field::first_of_pair},
      {"betas", offsetof(Options, beta2), Field::second_of_pair},
      {"weight_decay", offsetof(Options, weight_decay), Field::device_number},
      {"l1", offsetof(Options, l1), Field::optional_number},
      {"maximize", offsetof(Options, sign), Field::sign},
  };

  static constexpr BRAZE_INLINE uint32_t flags(const Options&) { return 0; }
  static constexpr BRAZE_INLINE bool uses(uint32_t, int) { return true; }

  template <class T>
  struct Args {
    T grad_scale, fold_weight;
    T l2, l1;
    T beta1, one_minus_beta1, beta2, one_minus_beta2;
    T param_decay, lr;
  };
  template <class Power>
  static BRAZE_INLINE Args<double> args(const Options& o, const StepInputs& in, Power&&) {
    return {.grad_scale = o.sign * in.grad_scale,
            .fold_weight = in.fold_weight,
            .l2 = 0,  // the decay is decoupled
            .l1 = o.l1,
            .beta1 = o.beta1,
            .one_minus_beta1 = 1 - o.beta1,
            .beta2 = o.beta2,
            .one_minus_beta2 = 1 - o.beta2,
            .param_decay = 1 - o.lr * o.weight_decay,
            .lr = o.lr};
  }

  // c = b1 m + (1 - b1) g;  p = (1 - lr decay) p - lr sign(c);  m = b2 m + (1 - b2) g.
  template <class V, class T>
  static BRAZE_INLINE void update(V& p, V g, V& m, const Args<T>& a, uint32_t flags) {
    g = effective_gradient(g, p, a, flags);
    const V c = fused_multiply_add(V(a.beta1), m, V(a.one_minus_beta1) * g);
    const V sign = select(c > V(0), V(1), select(c < V(0), V(-1), c));  // of 0 is 0, of NaN is NaN
    p = fused_multiply_add(V(-a.lr), sign, p * V(a.param_decay));
    m = fused_multiply_add(V(a.beta2), m, V(a.one_minus_beta2) * g);
  }
};

}  // namespace braze
