// Arguments of the batch-norm operators, checked and turned into plain structs.
#pragma once
#include "batch_norm.h"
#include "dense.h"
#include "new_like.h"

namespace braze {

// The vectors that belong to one normalised tensor. What kernels write to must be contiguous: a
// running statistic that is not lives in a copy until write_back().
class ChannelTensors {
 public:
  // Raises unless everything fits `input`. `suffix` ("" or "2") ends the arguments' names.
  ChannelTensors(const char* op, const char* suffix, const at::Tensor& input, const Norm& norm,
                 bool training);

  const BatchNormChannels& plain() const { return plain_; }
  // After the kernels have updated the running statistics.
  void written();

 private:
  at::Tensor weight_, bias_;
  at::Tensor running_mean_, running_var_, num_batches_tracked_;  // the caller's
  at::Tensor mean_copy_, var_copy_;                              // undefined: written in place
  BatchNormChannels plain_;
};

// [N, C, ...], dense, readable.
DenseActivation checked_input(const char* op, const at::Tensor& input);

// A tensor of `like`'s shape, device and dtype, in its order.
at::Tensor checked_like(const char* op, const char* name, const at::Tensor& tensor,
                        const at::Tensor& like);

// Null if there is none, or an empty one.
const uint8_t* checked_mask(const char* op, const OptionalTensor& mask,
                            const ActivationShape& shape, const at::Tensor& like);

// The arithmetic type of a dtype: double for double, else float.
c10::ScalarType arithmetic_type(const at::Tensor& tensor);

// A contiguous tensor of the arithmetic type, with these sizes.
const void* checked_array(const char* op, const char* name, const at::Tensor& tensor,
                          const at::Tensor& like, at::IntArrayRef sizes);

// Of the arithmetic type.
at::Tensor new_array(const at::Tensor& like, at::IntArrayRef sizes);
// A new mask of a forward, or an empty one.
at::Tensor new_mask(const at::Tensor& like, const ActivationShape& shape, bool wanted);

// One bit per element is saved where the derivative has two values and z is not x's alone.
inline bool mask_serves(Activation activation, bool has_residual) {
  return has_residual && has_two_slopes(activation);
}

// Raises ValueError unless it is the number of one.
Activation checked_activation(int64_t number);

}  // namespace braze
