// Batch normalisation fused with an activation, as torch operators. Schemas and checks are in
// batch_norm.cpp and batch_norm_sync.cpp.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "../plan/batch_norm.h"

namespace braze {

using OptionalTensor = std::optional<at::Tensor>;

// --- differentiable, for users (batch_norm_autograd.cpp) ---

// act(bn(input) + residual).
at::Tensor batch_norm_act(const at::Tensor& input, const OptionalTensor& weight,
                          const OptionalTensor& bias, const OptionalTensor& running_mean,
                          const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked, bool training,
                          std::optional<double> momentum, double eps, std::string_view activation,
                          double parameter, const OptionalTensor& residual);

// The same twice: two outputs in the same memory, whose gradients meet inside the backward kernels.
std::tuple<at::Tensor, at::Tensor> batch_norm_act_fork(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
    double eps, std::string_view activation, double parameter, const OptionalTensor& residual);

// act(bn(input) + bn2(input2)).
at::Tensor batch_norm_add_act(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
    const at::Tensor& input2, const OptionalTensor& weight2, const OptionalTensor& bias2,
    const OptionalTensor& running_mean2, const OptionalTensor& running_var2,
    const OptionalTensor& num_batches_tracked2, std::optional<double> momentum2, double eps2,
    bool training, std::string_view activation, double parameter);

std::tuple<at::Tensor, at::Tensor> batch_norm_add_act_fork(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
    const at::Tensor& input2, const OptionalTensor& weight2, const OptionalTensor& bias2,
    const OptionalTensor& running_mean2, const OptionalTensor& running_var2,
    const OptionalTensor& num_batches_tracked2, std::optional<double> momentum2, double eps2,
    bool training, std::string_view activation, double parameter);

// --- what they are made of (batch_norm.cpp) ---

// y, stats, stats2 (empty without input2), mask (empty unless save_mask asks for one that a
// residual join with a two-slope activation has).
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ForwardResult batch_norm_act_forward(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
    const OptionalTensor& input2, const OptionalTensor& weight2, const OptionalTensor& bias2,
    const OptionalTensor& running_mean2, const OptionalTensor& running_var2,
    const OptionalTensor& num_batches_tracked2, std::optional<double> momentum2, double eps2,
    const OptionalTensor& residual, bool training, std::string_view activation, double parameter,
    bool save_mask);

// Gradients of input, weight, bias, input2, weight2, bias2, residual; empty where output_mask has
// false.
using BackwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
BackwardResult batch_norm_act_backward(const at::Tensor& grad, const OptionalTensor& grad2,
                                       const at::Tensor& input, const OptionalTensor& weight,
                                       const at::Tensor& stats, const OptionalTensor& input2,
                                       const OptionalTensor& weight2, const OptionalTensor& stats2,
                                       const OptionalTensor& residual, const OptionalTensor& mask,
                                       bool training, std::string_view activation, double parameter,
                                       std::array<bool, 7> output_mask);

// --- the steps on their own, for statistics over several processes (batch_norm_sync.cpp) ---

at::Tensor batch_norm_moments(const at::Tensor& input);
at::Tensor batch_norm_combine(const at::Tensor& moments, const at::Tensor& input,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              const OptionalTensor& num_batches_tracked,
                              std::optional<double> momentum, double eps);
std::tuple<at::Tensor, at::Tensor> batch_norm_apply(const at::Tensor& input,
                                                    const at::Tensor& stats,
                                                    const OptionalTensor& residual,
                                                    std::string_view activation, double parameter);
at::Tensor batch_norm_reduce(const at::Tensor& grad, const at::Tensor& input,
                             const at::Tensor& stats, const OptionalTensor& residual,
                             const OptionalTensor& mask, std::string_view activation,
                             double parameter);
std::tuple<at::Tensor, at::Tensor> batch_norm_apply_grad(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& stats,
    const OptionalTensor& residual, const OptionalTensor& mask, const at::Tensor& sums,
    const at::Tensor& count, std::string_view activation, double parameter, bool need_residual);

}  // namespace braze
