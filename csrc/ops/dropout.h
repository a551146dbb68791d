// Dropout's operators, called through torch's dispatcher: autograd, compiler and fake tensors see
// them.
#pragma once
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../math/dropout.h"

namespace braze {

// The output, and the seed and offset of its mask as an int64 tensor [2].
using DropoutResult = std::tuple<at::Tensor, at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;
using OptionalTensor = std::optional<at::Tensor>;

// distinct: any tensor; a compiler must not take two calls with different ones for the same.
DropoutResult dropout(const at::Tensor& input, double p, bool alpha, bool feature,
                      const OptionalGenerator& generator, const OptionalTensor& distinct);
// In place; the seed and offset.
at::Tensor dropout_(at::Tensor& input, double p, bool alpha, bool feature,
                    const OptionalGenerator& generator);
// With a mask that was used before. gradient: only what is linear in the input.
at::Tensor dropout_apply(const at::Tensor& input, const at::Tensor& rng_state, double p, bool alpha,
                         bool feature, bool gradient);
DropoutResult dropout_add(const at::Tensor& input, const at::Tensor& residual, double p,
                          const OptionalGenerator& generator, const OptionalTensor& distinct);
DropoutResult act_dropout(const at::Tensor& input, double p, std::string_view activation,
                          double parameter, const OptionalGenerator& generator,
                          const OptionalTensor& distinct);
at::Tensor act_dropout_(at::Tensor& input, double p, std::string_view activation, double parameter,
                        const OptionalGenerator& generator);
// saved: relu's output, any other activation's input.
at::Tensor act_dropout_backward(const at::Tensor& grad, const at::Tensor& saved,
                                const at::Tensor& rng_state, double p, std::string_view activation,
                                double parameter);

// Whether the operators take this tensor: one with data on a device that has kernels, of one of
// their dtypes, without a tangent, outside functorch's transforms and torch.jit.trace.
bool dropout_takes(const at::Tensor& input);

DropoutTerms<double> dropout_terms_of(double p, bool alpha);

}  // namespace braze
