// What a tensor looked like when it was last recorded, and whether it still does.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace braze {

// Sizes and strides of a tensor, as a range of SeenTensors: [ndim] sizes, then [ndim] strides.
struct Dims {
  int32_t offset = 0, ndim = 0;
};

// A tensor as it was recorded. Others own the Python object that it is in.
struct SeenTensor {
  const at::Tensor* tensor = nullptr;
  const void* data = nullptr;     // of element 0
  const void* storage = nullptr;  // start of the storage's memory
  Dims dims;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  c10::DispatchKeySet keys;  // a lazy conjugation shows nowhere else
};

// The dimensions of many recorded tensors, side by side.
class SeenTensors {
 public:
  // known: dimensions that the tensor has, and that are recorded already; or null.
  void record(SeenTensor& entry, const at::Tensor& tensor, const Dims* known) {
    entry.tensor = &tensor;
    entry.data = tensor.const_data_ptr();
    entry.storage = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl()->data();
    entry.dtype = tensor.scalar_type();
    entry.keys = tensor.key_set();
    if (known != nullptr) {
      entry.dims = *known;
    } else if (!same_dims(entry.dims, tensor)) {
      entry.dims = {static_cast<int32_t>(dims_.size()), static_cast<int32_t>(tensor.dim())};
      dims_.insert(dims_.end(), tensor.sizes().begin(), tensor.sizes().end());
      dims_.insert(dims_.end(), tensor.strides().begin(), tensor.strides().end());
    }
  }

  // In the header, like same_dims(): every step asks this of every tensor.
  bool unchanged(const SeenTensor& entry) const {
    if (entry.tensor == nullptr) return true;
    const at::Tensor& tensor = *entry.tensor;
    const at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    if (!same_dims(entry.dims, tensor) || impl->key_set() != entry.keys ||
        c10::typeMetaToScalarType(impl->dtype()) != entry.dtype) {
      return false;
    }
    const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
    const char* memory = storage == nullptr ? nullptr : static_cast<const char*>(storage->data());
    const int64_t offset = impl->storage_offset() * static_cast<int64_t>(impl->itemsize());
    return memory == entry.storage && (entry.data == nullptr || memory + offset == entry.data);
  }

  void clear() { dims_.clear(); }

 private:
  __attribute__((always_inline)) bool same_dims(const Dims& dims, const at::Tensor& tensor) const {
    const at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    const c10::IntArrayRef sizes = impl->sizes(), strides = impl->strides();
    const size_t ndim = static_cast<size_t>(dims.ndim);
    if (sizes.size() != ndim) return false;
    const int64_t* seen = dims_.data() + dims.offset;
    int64_t differences = 0;
    for (size_t d = 0; d < ndim; ++d) {
      differences |= (sizes[d] ^ seen[d]) | (strides[d] ^ seen[ndim + d]);
    }
    return differences == 0;
  }

  std::vector<int64_t> dims_;
};

}  // namespace braze
