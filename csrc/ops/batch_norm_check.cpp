#include "batch_norm_check.h"

#include "tensor_work.h"

namespace braze {
namespace {

void check_vector(const char* op, const char* name, const char* suffix, const at::Tensor& vector,
                  const at::Tensor& input) {
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == input.size(1), op, ": ", name, suffix,
                    " must have one value for each of input", suffix, "'s ", input.size(1),
                    " channels, but its shape is ", vector.sizes());
  TORCH_CHECK_VALUE(vector.device() == input.device(), op, ": ", name, suffix, " is on ",
                    vector.device(), ", but input", suffix, " is on ", input.device());
  check_readable(op, name, vector);
}

at::Tensor present(const OptionalTensor& tensor) { return tensor ? *tensor : at::Tensor(); }

const void* data_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

void bump(const at::Tensor& tensor) {
  if (tensor.defined() && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

ChannelTensors::ChannelTensors(const char* op, const char* suffix, const at::Tensor& input,
                               const Norm& norm, bool training)
    : weight_(present(norm.weight)),
      bias_(present(norm.bias)),
      running_mean_(present(norm.running_mean)),
      running_var_(present(norm.running_var)),
      num_batches_tracked_(present(norm.num_batches_tracked)) {
  for (at::Tensor* parameter : {&weight_, &bias_}) {
    if (!parameter->defined()) continue;
    const char* name = parameter == &weight_ ? "weight" : "bias";
    check_vector(op, name, suffix, *parameter, input);
    const c10::ScalarType dtype = parameter->scalar_type();
    TORCH_CHECK_TYPE(dtype == input.scalar_type() ||
                         (dtype == c10::kFloat && input.scalar_type() != c10::kDouble),
                     op, ": ", name, suffix, " must be float32 or input", suffix, "'s ",
                     input.scalar_type(), ", but it is ", dtype);
    *parameter = parameter->contiguous();
  }
  if (weight_.defined() && bias_.defined()) {
    TORCH_CHECK_TYPE(weight_.scalar_type() == bias_.scalar_type(), op, ": weight", suffix, " is ",
                     weight_.scalar_type(), " and bias", suffix, " is ", bias_.scalar_type(),
                     "; they must have one dtype");
  }
  TORCH_CHECK_VALUE(running_mean_.defined() == running_var_.defined(), op, ": running_mean", suffix,
                    " and running_var", suffix, " must both be given, or neither");
  TORCH_CHECK_VALUE(training || running_mean_.defined(), op, ": running_mean", suffix,
                    " and running_var", suffix, " must be given when training is False");
  if (running_mean_.defined()) {
    check_vector(op, "running_mean", suffix, running_mean_, input);
    check_vector(op, "running_var", suffix, running_var_, input);
    TORCH_CHECK_TYPE(running_mean_.scalar_type() == running_var_.scalar_type(), op,
                     ": running_mean", suffix, " is ", running_mean_.scalar_type(),
                     " and running_var", suffix, " is ", running_var_.scalar_type(),
                     "; they must have one dtype");
    if (!running_mean_.is_contiguous()) mean_copy_ = running_mean_.contiguous();
    if (!running_var_.is_contiguous()) var_copy_ = running_var_.contiguous();
  }
  if (num_batches_tracked_.defined()) {
    TORCH_CHECK_TYPE(num_batches_tracked_.scalar_type() == c10::kLong, op, ": num_batches_tracked",
                     suffix, " must be int64, but it is ", num_batches_tracked_.scalar_type());
    TORCH_CHECK_VALUE(
        num_batches_tracked_.numel() == 1 && num_batches_tracked_.device() == input.device(), op,
        ": num_batches_tracked", suffix, " must be one number on ", input.device(), ", but it has ",
        num_batches_tracked_.numel(), " on ", num_batches_tracked_.device());
  }
  TORCH_CHECK_VALUE(
      norm.momentum || !training || !running_mean_.defined() || num_batches_tracked_.defined(), op,
      ": momentum", suffix, " None means a cumulative average, which needs num_batches_tracked",
      suffix);

  const at::Tensor& mean = mean_copy_.defined() ? mean_copy_ : running_mean_;
  const at::Tensor& var = var_copy_.defined() ? var_copy_ : running_var_;
  plain_.weight = data_of(weight_);
  plain_.bias = data_of(bias_);
  const at::Tensor& parameter = weight_.defined() ? weight_ : bias_;
  plain_.param_dtype = parameter.defined() ? *real_dtype(parameter.scalar_type()) : DType::f32;
  plain_.running_mean = const_cast<void*>(data_of(mean));
  plain_.running_var = const_cast<void*>(data_of(var));
  if (mean.defined()) plain_.running_dtype = *real_dtype(mean.scalar_type());
  if (training && num_batches_tracked_.defined()) {
    plain_.batches_tracked = static_cast<int64_t*>(num_batches_tracked_.mutable_data_ptr());
  }
  plain_.eps = norm.eps;
  plain_.momentum = norm.momentum.value_or(0);
  plain_.cumulative = !norm.momentum;
}

void ChannelTensors::written() {
  if (mean_copy_.defined()) running_mean_.copy_(mean_copy_);
  if (var_copy_.defined()) running_var_.copy_(var_copy_);
  for (const at::Tensor& tensor : {running_mean_, running_var_, num_batches_tracked_}) bump(tensor);
}

DenseActivation checked_input(const char* op, const at::Tensor& input) {
  check_readable(op, "input", input);
  TORCH_CHECK_VALUE(input.dim() >= 2, op,
                    ": input must have 2 dimensions or more, [N, C, ...], but its shape is ",
                    input.sizes());
  return dense_activation(input);
}

at::Tensor checked_like(const char* op, const char* name, const at::Tensor& tensor,
                        const at::Tensor& like) {
  check_like(op, name, tensor, like, "input");
  return in_order_of(tensor, like);
}

const uint8_t* checked_mask(const char* op, const OptionalTensor& mask,
                            const ActivationShape& shape, const at::Tensor& like) {
  if (!mask || mask->numel() == 0) return nullptr;
  TORCH_CHECK_VALUE(mask->scalar_type() == c10::kByte && mask->is_contiguous() &&
                        mask->numel() == shape.mask_bytes() && mask->device() == like.device(),
                    op, ": mask must be the ", shape.mask_bytes(), " bytes that the forward made");
  return mask->const_data_ptr<uint8_t>();
}

c10::ScalarType arithmetic_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == c10::kDouble ? c10::kDouble : c10::kFloat;
}

const void* checked_array(const char* op, const char* name, const at::Tensor& tensor,
                          const at::Tensor& like, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.is_contiguous(), op, ": ", name,
                    " must be a contiguous tensor of shape ", sizes, ", but its shape is ",
                    tensor.sizes(), " and its strides are ", tensor.strides());
  TORCH_CHECK_TYPE(tensor.scalar_type() == arithmetic_type(like), op, ": ", name, " must be ",
                   arithmetic_type(like), " for an input of ", like.scalar_type(), ", but it is ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": ", name, " is on ", tensor.device(),
                    ", but input is on ", like.device());
  return tensor.const_data_ptr();
}

at::Tensor new_array(const at::Tensor& like, at::IntArrayRef sizes) {
  return new_array(like, sizes, arithmetic_type(like));
}

at::Tensor new_mask(const at::Tensor& like, const ActivationShape& shape, bool wanted) {
  return new_array(like, {wanted ? shape.mask_bytes() : 0}, c10::kByte);
}

Activation checked_activation(int64_t number) {
  TORCH_CHECK_VALUE(number >= 0 && number < kNumActivations, "activation is number ", number,
                    "; there are ", kNumActivations);
  return static_cast<Activation>(number);
}

}  // namespace braze
