// Tensors of activations as dense memory: what the kernels of tensor operations read and write.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "../plan/batch_norm.h"
#include "device_backend.h"

namespace braze {

// Raises TypeError or ValueError unless kernels can read the tensor: strided, of a real
// floating-point dtype, on the CPU or on a device that has braze's kernels. `name` is the
// argument's.
void check_readable(const char* op, const char* name, const at::Tensor& tensor);

// Raises also unless `tensor` has the shape, device and dtype of `like`, which is argument
// `like_name`.
void check_like(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like,
                const char* like_name);

// The backend whose kernels work on the tensor; null: the CPU's.
const DeviceBackend* backend_of(const at::Tensor& tensor);

// Where the elements of a dense [N, C, ...] tensor are, or nothing if its strides are neither of
// the two orders.
std::optional<ActivationShape> activation_shape(const at::Tensor& tensor);

// The tensor itself, if activation_shape can read it, else a copy that it can: channels last if the
// strides suggest that.
struct DenseActivation {
  at::Tensor tensor;
  ActivationShape shape;
};
DenseActivation dense_activation(const at::Tensor& tensor);

// `tensor`, with its elements in memory as those of `like`, which has its shape. Converts the
// dtype.
at::Tensor in_order_of(const at::Tensor& tensor, const at::Tensor& like);

// torch's number of threads, or 1 inside one of its parallel regions.
int allowed_threads();

}  // namespace braze
