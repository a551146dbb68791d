// Adam and AdamW.
#pragma once
#include "rule.h"

namespace braze {

struct Adam : RuleDefaults {
  static constexpr const char* kName = "adam";
  static constexpr int kStates = 3;
  static constexpr const char* kStateNames[kStates] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr bool kCountsSteps = true;

  static constexpr uint32_t kAmsgrad = kRuleFlag, kRareFlags = kAmsgrad;
  static constexpr uint32_t kFlags = kAmsgrad;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, l1;
    double sign;  // -1 to maximize
    bool amsgrad, decoupled;
  };
  static constexpr Field kFields[] = {
      {"lr", offsetof(Options, lr), Field::device_number},
      {"betas", offsetof(Options, beta1), Field::first_of_pair},
      {"betas", offsetof(Options, beta2), Field::second_of_pair},
      {"eps", offsetof(Options, eps), Field::number},
      {"weight_decay", offsetof(Options, weight_decay), Field::device_number},
      {"l1", offsetof(Options, l1), Field::optional_number},
      {"maximize", offsetof(Options, sign), Field::sign},
      {"amsgrad", offsetof(Options, amsgrad), Field::flag},
      {"decoupled_weight_decay", offsetof(Options, decoupled), Field::flag},
  };

  static constexpr BRAZE_INLINE uint32_t flags(const Options& o) {
    return o.amsgrad ? kAmsgrad : 0;
  }
  static constexpr BRAZE_INLINE bool uses(uint32_t flags, int k) {
    return k < 2 || (flags & kAmsgrad);
  }

  template <class T>
  struct Args {
    T grad_scale;   // negative to maximize
    T fold_weight;  // weight of the gradient that joins an accumulator
    T beta1, one_minus_beta1;
    T beta2, one_minus_beta2;
    T l2, l1;
    T param_decay;           // 1 - lr * weight_decay when decoupled, else 1
    T step_size;             // lr / (1 - beta1^t)
    T inv_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
    T eps;
  };
  template <class Power>
  static BRAZE_INLINE Args<double> args(const Options& o, const StepInputs& in, Power&& power) {
    return {.grad_scale = o.sign * in.grad_scale,
            .fold_weight = in.fold_weight,
            .beta1 = o.beta1,
            .one_minus_beta1 = 1 - o.beta1,
            .beta2 = o.beta2,
            .one_minus_beta2 = 1 - o.beta2,
            .l2 = o.decoupled ? 0 : o.weight_decay,
            .l1 = o.l1,
            .param_decay = o.decoupled ? 1 - o.lr * o.weight_decay : 1,
            .step_size = o.lr / (1 - power(o.beta1, in.step)),
            .inv_sqrt_correction2 = 1 / ::sqrt(1 - power(o.beta2, in.step)),
            .eps = o.eps};
  }

  // m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
  // p = decay p - step_size m / (sqrt(v) / sqrt(1 - b2^t) + eps).
  // One division: sqrt(v) is multiplied by the reciprocal of its correction, so that eps keeps
  // torch's meaning.
  template <class V, class T>
  static BRAZE_INLINE void update(V& p, V g, V& m, V& v, V& v_max, const Args<T>& a,
                                  uint32_t flags) {
    g = effective_gradient(g, p, a, flags);
    const V decayed = p * V(a.param_decay);
    m = fused_multiply_add(V(a.beta1), m, V(a.one_minus_beta1) * g);
    v = fused_multiply_add(V(a.beta2), v, V(a.one_minus_beta2) * g * g);
    V second = v;
    if (flags & kAmsgrad) {
      // A NaN on either side stays, as torch.maximum keeps it.
      v_max = select(v_max != v_max, v_max, select(v_max >= v, v_max, v));
      second = v_max;
    }
    const V denominator =
        fused_multiply_add(square_root(second), V(a.inv_sqrt_correction2), V(a.eps));
    p = fused_multiply_add(V(-a.step_size), m / denominator, decayed);
  }
};

}  // namespace braze
