// Hyper-parameters as the kernels read them, no torch: computed once per (group, step count).
#pragma once
#include "../math/optimizer.h"
#include "tensor_work.h"

namespace braze {

// Rounded once to both arithmetic types.
struct AdamHyper {
  AdamArgs<float> f;
  AdamArgs<double> d;
  bool penalty;
  bool amsgrad;
};

struct SgdHyper {
  SgdArgs<float> f;
  SgdArgs<double> d;
  bool penalty;
  bool has_momentum;
  bool nesterov;
};

// sum = keep * sum + weight * grad, in TensorWork::state[0].
struct FoldHyper {
  double weight, keep;
};

// A number that a kernel reads from device memory when it runs; data is null where the host gave
// it.
struct DeviceScalar {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// Of a step whose numbers are in device memory in part: the kernel makes the arguments.
struct AdamDeviceHyper {
  AdamRule rule;
  double step;  // after this step; read only where the count is not in device memory
  double grad_scale, fold_weight;
  DeviceScalar lr, beta1, beta2, weight_decay;
  bool amsgrad;
};

struct SgdDeviceHyper {
  SgdRule rule;
  double grad_scale, fold_weight;
  DeviceScalar lr, weight_decay, momentum, dampening;
  bool decayed;  // the momentum buffer already was, in this window
  bool has_momentum;
  bool nesterov;
};

}  // namespace braze
