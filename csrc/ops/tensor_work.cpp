#include "tensor_work.h"

#include <c10/core/DispatchKeySet.h>

namespace braze {

std::optional<DType> real_dtype(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::ScalarType::Float:
    case c10::ScalarType::ComplexFloat: return DType::f32;
    case c10::ScalarType::Double:
    case c10::ScalarType::ComplexDouble: return DType::f64;
    case c10::ScalarType::BFloat16: return DType::bf16;
    case c10::ScalarType::Half: return DType::f16;
    default: return std::nullopt;
  }
}

bool is_plain(const at::Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.key_set();
  return tensor.layout() == c10::kStrided && tensor.has_storage() && !tensor.is_meta() &&
         !keys.has(c10::DispatchKey::Python) && !keys.has(c10::DispatchKey::Conjugate) &&
         !keys.has(c10::DispatchKey::Negative) && !keys.has(c10::DispatchKey::FuncTorchBatched) &&
         !keys.has(c10::DispatchKey::FuncTorchGradWrapper) &&
         !keys.has(c10::DispatchKey::Functionalize);
}

bool same_order(const at::Tensor& a, const at::Tensor& b) {
  const c10::IntArrayRef x = a.strides(), y = b.strides();
  if (x == y) return true;
  for (size_t d = 0; d < x.size(); ++d) {
    if (x[d] != y[d] && a.size(static_cast<int64_t>(d)) != 1) return false;
  }
  return true;
}

Operand linear_operand(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), nullptr, *real_dtype(tensor.scalar_type())};
}

namespace {

// A complex element is two reals: one more dimension of size 2.
void real_strides(const at::Tensor& tensor, std::vector<int64_t>& strides) {
  strides = tensor.strides().vec();
  if (!tensor.is_complex()) return;
  for (int64_t& stride : strides) stride *= 2;
  strides.push_back(1);
}

void real_sizes(const at::Tensor& tensor, std::vector<int64_t>& sizes) {
  sizes = tensor.sizes().vec();
  if (tensor.is_complex()) sizes.push_back(2);
}

}  // namespace

Footprint footprint(const at::Tensor& tensor) {
  Footprint f;
  f.base = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  f.itemsize = static_cast<int64_t>(tensor.itemsize());
  f.sizes = tensor.sizes().vec();
  f.strides = tensor.strides().vec();
  f.dense = tensor.is_non_overlapping_and_dense();
  return f;
}

void lay_out(TensorWork& work, const std::vector<NamedOperand>& operands,
             std::deque<Layout>& layouts) {
  const at::Tensor& lead = *operands.front().tensor;
  work.numel = lead.numel() * (lead.is_complex() ? 2 : 1);
  work.linear = lead.is_non_overlapping_and_dense();
  Layout layout;
  for (const NamedOperand& o : operands) {
    *o.operand = o.tensor == nullptr ? Operand{} : linear_operand(*o.tensor);
    if (o.tensor != nullptr) work.linear = work.linear && same_order(lead, *o.tensor);
  }
  if (work.linear || work.numel == 0) return;
  real_sizes(lead, layout.sizes);
  for (const NamedOperand& o : operands) {
    if (o.tensor == nullptr) continue;
    layout.strides.emplace_back();
    real_strides(*o.tensor, layout.strides.back());
  }
  simplify(layout);
  TORCH_CHECK_VALUE(layout.sizes.size() <= kMaxDims, "a parameter of shape ", lead.sizes(),
                    " has more than ", kMaxDims, " dimensions that cannot be merged");
  layouts.push_back(std::move(layout));
  const Layout& kept = layouts.back();
  work.sizes = kept.sizes.data();
  work.ndim = static_cast<int32_t>(kept.sizes.size());
  size_t k = 0;
  for (const NamedOperand& o : operands) {
    if (o.tensor != nullptr) o.operand->strides = kept.strides[k++].data();
  }
}

}  // namespace braze
