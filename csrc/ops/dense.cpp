#include "dense.h"

#include <ATen/Parallel.h>

#include "new_like.h"
#include "tensor_work.h"

namespace braze {
namespace {

// Strides of dimensions order[0], order[1], ... are those of dense memory, outermost first.
bool is_dense(const at::Tensor& tensor, bool channels_last) {
  if (tensor.numel() == 0) return true;
  int64_t expected = 1;
  const auto matches = [&](int64_t d) {
    const bool right = tensor.size(d) == 1 || tensor.stride(d) == expected;
    expected *= tensor.size(d);
    return right;
  };
  if (channels_last && !matches(1)) return false;
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    if (!matches(d)) return false;
  }
  return (channels_last || matches(1)) && matches(0);
}

}  // namespace

void check_readable(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.layout() == c10::kStrided, op, ": ", name,
                   " must be a dense tensor, but its layout is ", tensor.layout());
  TORCH_CHECK_TYPE(!tensor.is_complex() && real_dtype(tensor.scalar_type()), op, ": ", name,
                   " must be float32, float64, bfloat16 or float16, but it is ",
                   tensor.scalar_type());
  TORCH_CHECK(tensor.is_cpu() || backend_of(tensor) != nullptr, op, ": ", name, " is on ",
              tensor.device(),
              ", for which braze has no kernels here; `python -m braze info` says why");
}

void check_like(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like,
                const char* like_name) {
  check_readable(op, name, tensor);
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes(), op, ": ", name, " must have ", like_name,
                    "'s shape ", like.sizes(), ", but its shape is ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": ", name, " is on ", tensor.device(),
                    ", but ", like_name, " is on ", like.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have ",
                   like_name, "'s dtype ", like.scalar_type(), ", but it is ",
                   tensor.scalar_type());
}

const DeviceBackend* backend_of(const at::Tensor& tensor) { return device_place(tensor).backend; }

std::optional<ActivationShape> activation_shape(const at::Tensor& tensor) {
  ActivationShape shape;
  shape.n = tensor.size(0);
  shape.c = tensor.size(1);
  shape.spatial = 1;
  for (int64_t d = 2; d < tensor.dim(); ++d) shape.spatial *= tensor.size(d);
  shape.dtype = *real_dtype(tensor.scalar_type());
  shape.channels_last = shape.c > 1 && (shape.spatial == 1 || !is_dense(tensor, false));
  if (!is_dense(tensor, shape.channels_last)) return std::nullopt;
  return shape;
}

DenseActivation dense_activation(const at::Tensor& tensor) {
  if (const std::optional<ActivationShape> shape = activation_shape(tensor)) {
    return {tensor, *shape};
  }
  const at::Tensor copy = tensor.contiguous(tensor.suggest_memory_format());
  return {copy, *activation_shape(copy)};
}

int allowed_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

at::Tensor in_order_of(const at::Tensor& tensor, const at::Tensor& like) {
  if (tensor.scalar_type() == like.scalar_type() && same_order(tensor, like)) return tensor;
  at::Tensor copy = new_like(like);
  copy.copy_(tensor);
  return copy;
}

}  // namespace braze
