// SGD, and CAG, which is SGD with a window of micro-batches.
#pragma once
#include "fold.h"

namespace braze {

struct Sgd : RuleDefaults {
  static constexpr const char* kName = "sgd";
  static constexpr int kStates = 1;
  static constexpr const char* kStateNames[kStates] = {"momentum_buffer"};
  static constexpr bool kFirstOverwrites = true;
  static constexpr bool kSumsInState = true;

  static constexpr uint32_t kMomentum = kRuleFlag, kNesterov = kRuleFlag << 1;
  static constexpr uint32_t kFlags = kMomentum | kNesterov;

  struct Options {
    double lr, weight_decay, l1, momentum, dampening;
    double sign;  // -1 to maximize
    bool nesterov;
  };
  static constexpr Field kFields[] = {
      {"lr", offsetof(Options, lr), Field::device_number},
      {"weight_decay", offsetof(Options, weight_decay), Field::device_number},
      {"l1", offsetof(Options, l1), Field::optional_number},
      {"momentum", offsetof(Options, momentum), Field::device_number},
      {"dampening", offsetof(Options, dampening), Field::device_number},
      {"maximize", offsetof(Options, sign), Field::sign},
      {"nesterov", offsetof(Options, nesterov), Field::flag},
  };

  static constexpr BRAZE_INLINE uint32_t flags(const Options& o) {
    return o.momentum == 0 ? 0 : kMomentum | (o.nesterov ? kNesterov : 0);
  }
  static constexpr bool zeros_serve(const Options& o) { return o.dampening == 0; }
  static constexpr bool occurs(uint32_t flags) {
    return (flags & kMomentum) || !(flags & (kNesterov | kFirst));
  }
  static constexpr BRAZE_INLINE bool uses(uint32_t flags, int) { return flags & kMomentum; }

  template <class T>
  struct Args {
    T grad_scale;
    T fold_weight;
    T l2, l1;
    T momentum, one_minus_dampening;
    T lr;
  };
  // The buffer was multiplied by the momentum when the open window began.
  template <class Power>
  static BRAZE_INLINE Args<double> args(const Options& o, const StepInputs& in, Power&&) {
    return {.grad_scale = o.sign * in.grad_scale,
            .fold_weight = in.fold_weight,
            .l2 = o.weight_decay,
            .l1 = o.l1,
            .momentum = in.in_window ? 1.0 : o.momentum,
            .one_minus_dampening = in.in_window ? 1.0 : 1 - o.dampening,
            .lr = o.lr};
  }
  // How the first gradient of an accumulation window joins the buffer, which carries the sign of
  // the update's direction.
  static Fold::Options sum_in_state(const Options& o) {
    return {.weight = o.sign, .keep = o.momentum};
  }

  // b = mu b + (1 - dampening) g;  p = p - lr (nesterov ? g + mu b : b). A buffer that does not
  // exist yet starts as the gradient, undampened.
  template <class V, class T>
  static BRAZE_INLINE void update(V& p, V g, V& buffer, const Args<T>& a, uint32_t flags) {
    g = effective_gradient(g, p, a, flags);
    V direction = g;
    if (flags & kMomentum) {
      buffer = flags & kFirst
                   ? g
                   : fused_multiply_add(V(a.momentum), buffer, V(a.one_minus_dampening) * g);
      direction = flags & kNesterov ? fused_multiply_add(V(a.momentum), buffer, g) : buffer;
    }
    p = fused_multiply_add(V(-a.lr), direction, p);
  }
};

}  // namespace braze
