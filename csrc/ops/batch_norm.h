// Batch normalisation fused with an activation, as torch operators. Schemas and checks are in
// batch_norm.cpp and batch_norm_sync.cpp.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "../plan/batch_norm.h"

namespace braze {

using OptionalTensor = std::optional<at::Tensor>;

// What belongs to one normalised tensor beside its elements.
struct Norm {
  const OptionalTensor &weight, &bias, &running_mean, &running_var, &num_batches_tracked;
  std::optional<double> momentum;  // none: the average over num_batches_tracked
  double eps;
};

// torch's dispatcher knows no structs: a Norm as parameters, whose names end in n, the Norm that
// they make, and how a schema says it; what a kernel writes has aliases from `alias` on.
#define BRAZE_NORM_PARAMETERS(n)                                                       \
  const OptionalTensor &weight##n, const OptionalTensor &bias##n,                      \
      const OptionalTensor &running_mean##n, const OptionalTensor &running_var##n,     \
      const OptionalTensor &num_batches_tracked##n, std::optional<double> momentum##n, \
      double eps##n
#define BRAZE_NORM(n)                                                                         \
  Norm {                                                                                      \
    weight##n, bias##n, running_mean##n, running_var##n, num_batches_tracked##n, momentum##n, \
        eps##n                                                                                \
  }
std::string norm_schema(const std::string& n, char alias);

// --- differentiable, for users (batch_norm_autograd.cpp) ---

// act(bn(input) + residual).
at::Tensor batch_norm_act(const at::Tensor& input, BRAZE_NORM_PARAMETERS(), bool training,
                          std::string_view activation, double parameter,
                          const OptionalTensor& residual);

// act(bn(input) + bn2(input2)).
at::Tensor batch_norm_add_act(const at::Tensor& input, BRAZE_NORM_PARAMETERS(),
                              const at::Tensor& input2, BRAZE_NORM_PARAMETERS(2), bool training,
                              std::string_view activation, double parameter);

// The same results, each as two outputs in the same memory, whose gradients meet inside the
// backward kernels.
using Fork = std::tuple<at::Tensor, at::Tensor>;
Fork batch_norm_act_fork(const at::Tensor& input, BRAZE_NORM_PARAMETERS(), bool training,
                         std::string_view activation, double parameter,
                         const OptionalTensor& residual);
Fork batch_norm_add_act_fork(const at::Tensor& input, BRAZE_NORM_PARAMETERS(),
                             const at::Tensor& input2, BRAZE_NORM_PARAMETERS(2), bool training,
                             std::string_view activation, double parameter);

// --- what they are made of (batch_norm.cpp); `activation` is the number of an Activation ---

// y, stats, stats2 (empty without input2), mask (empty unless save_mask asks for one that a
// residual join with a two-slope activation has).
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ForwardResult batch_norm_act_forward(const at::Tensor& input, BRAZE_NORM_PARAMETERS(),
                                     const OptionalTensor& input2, BRAZE_NORM_PARAMETERS(2),
                                     const OptionalTensor& residual, bool training,
                                     int64_t activation, double parameter, bool save_mask);

// Gradients of input, weight, bias, input2, weight2, bias2, residual; empty where output_mask has
// false.
using BackwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
BackwardResult batch_norm_act_backward(const at::Tensor& grad, const OptionalTensor& grad2,
                                       const at::Tensor& input, const OptionalTensor& weight,
                                       const at::Tensor& stats, const OptionalTensor& input2,
                                       const OptionalTensor& weight2, const OptionalTensor& stats2,
                                       const OptionalTensor& residual, const OptionalTensor& mask,
                                       bool training, int64_t activation, double parameter,
                                       std::array<bool, 7> output_mask);

// --- the steps on their own, for statistics over several processes and for convolutions that
// compute some of them (batch_norm_sync.cpp) ---

at::Tensor batch_norm_moments(const at::Tensor& input);
at::Tensor batch_norm_combine(const at::Tensor& moments, const at::Tensor& input,
                              BRAZE_NORM_PARAMETERS());
std::tuple<at::Tensor, at::Tensor> batch_norm_apply(const at::Tensor& input,
                                                    const at::Tensor& stats,
                                                    const OptionalTensor& residual,
                                                    int64_t activation, double parameter);
at::Tensor batch_norm_reduce(const at::Tensor& grad, const at::Tensor& input,
                             const at::Tensor& stats, const OptionalTensor& residual,
                             const OptionalTensor& mask, int64_t activation, double parameter);
std::tuple<at::Tensor, at::Tensor> batch_norm_apply_grad(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& stats,
    const OptionalTensor& residual, const OptionalTensor& mask, const at::Tensor& sums,
    const at::Tensor& count, int64_t activation, double parameter, bool need_residual);
// The gradient of a normalised input, from that of its normalised value and what reduce made of it.
at::Tensor batch_norm_input_grad(const at::Tensor& grad, const at::Tensor& input,
                                 const at::Tensor& stats, const at::Tensor& coefficients);

}  // namespace braze
