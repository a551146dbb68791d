// Tensors to plain TensorWork.
#pragma once
#include <ATen/core/Tensor.h>

#include <deque>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../plan/layout.h"
#include "../plan/tensor_work.h"

namespace braze {

// The real arithmetic type behind a dtype (complex tensors are pairs of it), or nothing if there is
// no kernel for it.
std::optional<DType> real_dtype(c10::ScalarType dtype);

// True for a tensor whose memory may be read as it stands by its device: strided, real data
// pointer, no lazy conjugate or negative bit, no Python dispatch.
bool is_plain(const at::Tensor& tensor);

// Same order in memory: equal strides, where dimensions of size 1 do not count.
bool same_order(const at::Tensor& a, const at::Tensor& b);

Operand linear_operand(const at::Tensor& tensor);

Footprint footprint(const at::Tensor& tensor);

// Fills sizes, strides and pointers of `work` for operands of one shape; null tensors are skipped.
// The first is the parameter, whose memory order leads. `layouts` owns what the work points to.
struct NamedOperand {
  const at::Tensor* tensor;
  Operand* operand;
};
void lay_out(TensorWork& work, const std::vector<NamedOperand>& operands,
             std::deque<Layout>& layouts);

}  // namespace braze
