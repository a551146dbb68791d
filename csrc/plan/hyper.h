// Hyper-parameters as the kernels read them, no torch: computed once per (group, step count).
#pragma once
#include <vector>

#include "../math/rules.h"
#include "tensor_work.h"

namespace braze {

// Rounded once to both arithmetic types.
template <class Rule>
struct Hyper {
  typename Rule::template Args<float> f;
  typename Rule::template Args<double> d;
  uint32_t flags;
};

template <class Args>
BRAZE_INLINE uint32_t penalty_flag(const Args& args) {
  if constexpr (requires { args.l2; }) {
    return args.l2 != 0 || args.l1 != 0 ? kPenalty : 0u;
  } else {
    return 0;
  }
}

template <class Rule, class Power = WholePower>
Hyper<Rule> make_hyper(const typename Rule::Options& options, const StepInputs& inputs,
                       Power&& power = {}) {
  const auto args = Rule::args(options, inputs, power);
  return {rounded(args), args, Rule::flags(options) | penalty_flag(args)};
}

// A number that a kernel reads from device memory when it runs; data is null where the host gave
// it.
struct DeviceScalar {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// Of a step whose numbers are in device memory in part: the kernel makes the arguments.
template <class Rule>
struct DeviceHyper {
  typename Rule::Options options;
  StepInputs inputs;  // the step is read only where the count is not in device memory
  DeviceScalar scalars[kDeviceFields<Rule>];  // [j]: the rule's j-th field that may be here

  // The double among `options` that scalars[j] stands for.
  template <size_t j>
  static BRAZE_INLINE double& field(typename Rule::Options& options) {
    char* bytes = reinterpret_cast<char*>(&options);
    return *reinterpret_cast<double*>(bytes + kDeviceFieldOffset<Rule, j>);
  }
};

template <class Rule>
Hypers view_of(const std::vector<Hyper<Rule>>& hypers) {
  return {Rules::index_of<Rule>(), false, hypers.data(), hypers.size()};
}
template <class Rule>
Hypers view_of(const std::vector<DeviceHyper<Rule>>& hypers) {
  return {Rules::index_of<Rule>(), true, hypers.data(), hypers.size()};
}

}  // namespace braze
