#include "fake_operators.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/strides.h>
#include <cuda_runtime.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fake_device.h"

namespace fake_device {
namespace {

constexpr c10::DispatchKeySet kHostKeys(c10::DispatchKey::CPU);
constexpr c10::DispatchKeySet kSparseKeys(c10::DispatchKey::SparseCUDA);
constexpr c10::DispatchKeySet kSparseHostKeys(c10::DispatchKey::SparseCPU);

// ------------------------------------------------------------------ memory

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
    memory.unsafe_set_device({kType, current_device()});
    return memory;
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Allocator allocator;

void release_storage(void* storage) { delete static_cast<c10::Storage*>(storage); }

// The same memory on another device; it lives as long as either.
c10::DataPtr shared(const c10::Storage& storage, c10::Device device) {
  void* const data = storage.mutable_data();
  return {data, new c10::Storage(storage), &release_storage, device};
}

c10::Storage storage_on(const c10::Storage& storage, c10::Device device) {
  c10::Allocator* const source = device.is_cpu() ? c10::GetCPUAllocator() : &allocator;
  return {c10::Storage::use_byte_size_t{}, storage.nbytes(), shared(storage, device), source, true};
}

void copy_geometry(const at::Tensor& from, const at::Tensor& to) {
  to.unsafeGetTensorImpl()->set_sizes_and_strides(from.sizes(), from.strides(),
                                                  from.storage_offset());
}

bool same_geometry(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() &&
         a.storage_offset() == b.storage_offset();
}

at::Tensor view_of(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKeySet keys) {
  if (tensor._is_zerotensor()) keys = keys.add(c10::DispatchKey::ZeroTensor);
  at::Tensor view =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  copy_geometry(tensor, view);
  view._set_conj(tensor.is_conj());
  view._set_neg(tensor.is_neg());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    view.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return view;
}

at::SparseTensorImpl* sparse(const at::Tensor& tensor) {
  return static_cast<at::SparseTensorImpl*>(tensor.unsafeGetTensorImpl());
}

void set_sparse(const at::Tensor& tensor, const at::Tensor& like, const at::Tensor& indices,
                const at::Tensor& values) {
  sparse(tensor)->raw_resize_(sparse(like)->sparse_dim(), sparse(like)->dense_dim(), like.sizes());
  sparse(tensor)->set_indices_and_values_unsafe(indices, values);
  sparse(tensor)->set_coalesced(sparse(like)->coalesced());
}

at::Tensor sparse_of(const at::Tensor& like, const at::Tensor& indices, const at::Tensor& values,
                     c10::DispatchKeySet keys) {
  at::Tensor made = at::detail::make_tensor<at::SparseTensorImpl>(keys, like.dtype());
  set_sparse(made, like, indices, values);
  return made;
}

// ------------------------------------------------------------------ operators

// These read or write either device's memory.
bool may_mix(const std::string& name) {
  static const std::unordered_set<std::string_view> names = {
      "aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_"};
  return names.contains(name);
}

// Elsewhere a tensor without dimensions may be the CPU's: it is passed as a number.
bool takes_no_number(const std::string& name) {
  static const std::unordered_set<std::string_view> names = {"aten::equal", "aten::cat"};
  return names.contains(name);
}

// The host reads what these give, for which it waits.
bool waits(const std::string& name) {
  static const std::unordered_set<std::string_view> names = {"aten::_local_scalar_dense",
                                                             "aten::equal", "aten::nonzero"};
  return names.contains(name);
}

bool is_capturing() {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream().stream(), &status);
  return status != cudaStreamCaptureStatusNone;
}

// One call of an operator with the device's tensors, as a call with the CPU's.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : schema_(op.schema()) {}

  void to_host(torch::jit::Stack& stack) {
    const auto& arguments = schema_.arguments();
    const size_t first = stack.size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i) visit(arguments[i], stack[first + i]);
    TORCH_CHECK(device_, schema_.name(), ": no argument is on the device");
    for (const auto& [name, tensor, written] : on_host_) check_mixed(name, tensor, written);
    const bool crosses = schema_.name() == "aten::copy_" && !on_host_.empty();
    TORCH_CHECK(!((crosses || waits(schema_.name())) && is_capturing()), schema_.name(),
                ": CUDA error: operation not permitted when stream is capturing");
    for (size_t i = 0; i < arguments.size(); ++i) {
      const bool draws = arguments[i].type()->str().find("Generator") != std::string::npos;
      if (draws) replace_generator(stack[first + i]);
    }
  }

  void from_host(torch::jit::Stack& stack) {
    for (const auto& [tensor, host] : tensors_) write_back(tensor, host);
    for (size_t i = stack.size() - schema_.returns().size(); i < stack.size(); ++i) {
      if (stack[i].isTensor()) {
        stack[i] = result(stack[i].toTensor());
      } else if (stack[i].isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& tensor : stack[i].toTensorVector()) list.push_back(result(tensor));
        stack[i] = list;
      }
    }
  }

 private:
  struct HostArgument {
    std::string name;
    at::Tensor tensor;
    bool written;
  };

  void visit(const c10::Argument& argument, c10::IValue& value) {
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      value = host(argument.name(), value.toTensor(), written);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(host(argument.name(), tensor, written));
      }
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::optional(host(argument.name(), *tensor, written)) : tensor);
      }
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == kType) {
      const c10::Device device = value.toDevice();
      if (!device_) device_ = device.has_index() ? device : c10::Device(kType, current_device());
      value = c10::Device(c10::kCPU);
    }
  }

  at::Tensor host(const std::string& name, const at::Tensor& tensor, bool written) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kType) {
      on_host_.push_back({name, tensor, written});
      return tensor;
    }
    TORCH_CHECK(!device_ || may_mix(schema_.name()) || tensor.device() == *device_,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                *device_, " and ", tensor.device(), "! (when checking argument ", name, " of ",
                schema_.name(), ")");
    if (!device_) device_ = tensor.device();
    for (const auto& [seen, its_host] : tensors_) {
      if (seen.is_same(tensor)) return its_host;
    }
    at::Tensor made =
        tensor.is_sparse()
            ? sparse_of(tensor, host(name, sparse(tensor)->indices(), written),
                        host(name, sparse(tensor)->values(), written), kSparseHostKeys)
            : view_of(tensor, host_storage(tensor.storage()), kHostKeys);
    tensors_.emplace_back(tensor, made);
    return made;
  }

  // One for each storage, so that operators see which arguments overlap.
  c10::Storage host_storage(const c10::Storage& storage) {
    for (const auto& [seen, its_host] : storages_) {
      if (seen.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return its_host;
    }
    c10::Storage made = storage_on(storage, c10::kCPU);
    storages_.emplace_back(storage, made);
    return made;
  }

  void check_mixed(const std::string& name, const at::Tensor& tensor, bool written) const {
    const std::string& op = schema_.name();
    const bool number = tensor.dim() == 0 && !written && !takes_no_number(op);
    TORCH_CHECK(may_mix(op) || number,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                *device_, " and ", tensor.device(), "! (when checking argument ", name, " of ", op,
                ")");
  }

  void replace_generator(c10::IValue& value) const {
    value =
        host_generator(value.isNone() ? default_generator(device_->index()) : value.toGenerator());
  }

  // What an operator may change besides values: the size and the memory.
  void write_back(const at::Tensor& tensor, const at::Tensor& host) const {
    if (host.is_sparse()) {
      set_sparse(tensor, host, result(sparse(host)->indices()), result(sparse(host)->values()));
      return;
    }
    if (host.storage().data() != tensor.storage().data()) {
      c10::StorageImpl* const storage = tensor.storage().unsafeGetStorageImpl();
      storage->set_data_ptr_noswap(shared(host.storage(), tensor.device()));
      storage->set_nbytes(host.storage().nbytes());
    }
    if (!same_geometry(tensor, host)) copy_geometry(host, tensor);
  }

  at::Tensor result(const at::Tensor& host) const {
    if (!host.defined()) return host;
    for (const auto& [tensor, its_host] : tensors_) {
      if (its_host.is_same(host)) return tensor;
    }
    for (const HostArgument& argument : on_host_) {
      if (argument.tensor.is_same(host)) return host;
    }
    if (host.is_sparse()) {
      return sparse_of(host, result(sparse(host)->indices()), result(sparse(host)->values()),
                       kSparseKeys);
    }
    for (const auto& [storage, its_host] : storages_) {
      if (its_host.unsafeGetStorageImpl() == host.storage().unsafeGetStorageImpl()) {
        return view_of(host, storage, kKeys);
      }
    }
    return view_of(host, storage_on(host.storage(), *device_), kKeys);
  }

  const c10::FunctionSchema& schema_;
  std::optional<c10::Device> device_;
  std::vector<HostArgument> on_host_;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

void on_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  Call call(op);
  call.to_host(*stack);
  op.redispatchBoxed(keys.has(c10::DispatchKey::SparseCUDA) ? kSparseHostKeys : kHostKeys, stack);
  call.from_host(*stack);
}

c10::DeviceIndex index_of(std::optional<c10::Device> device) {
  return device && device->has_index() ? device->index() : current_device();
}

class Guard {
 public:
  explicit Guard(std::optional<c10::Device> device) {
    cudaGetDevice(&before_);
    cudaSetDevice(index_of(device));
  }
  ~Guard() { cudaSetDevice(before_); }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  int before_ = 0;
};

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
                 std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>,
                 std::optional<c10::MemoryFormat> format) {
  const Guard guard(device);
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                         std::optional<c10::Device> device, std::optional<bool>) {
  const Guard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys,
                                           c10::dtype_or_default(dtype));
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source, int64_t offset,
                        c10::IntArrayRef size, c10::IntArrayRef stride) {
  c10::TensorImpl* const impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(
      size, stride.empty() ? c10::contiguous_strides(size) : c10::DimVector(stride), offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, c10::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {count}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(),
                     source.strides());
}

}  // namespace

void register_operators() {
  c10::SetAllocator(kType, &allocator);
  const auto any_operator = torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>;
  static torch::Library fallback(torch::Library::IMPL, "_", c10::DispatchKey::CUDA, __FILE__,
                                 __LINE__);
  fallback.fallback(any_operator());
  static torch::Library aten(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__,
                             __LINE__);
  aten.impl("empty.memory_format", empty);
  aten.impl("empty_strided", empty_strided);
  aten.impl("set_.source_Storage", set_whole_storage);
  aten.impl("set_.source_Storage_storage_offset", set_storage);
  aten.impl("set_.source_Tensor", set_tensor);
  // These have code for all devices, which asks for a table of the device's kernels.
  for (const char* name : {"copy_", "_convolution", "convolution_backward"}) {
    aten.impl(name, any_operator());
  }
  // Of sparse tensors, what the CPU has code of its own for.
  static torch::Library sparse_aten(torch::Library::IMPL, "aten", c10::DispatchKey::SparseCUDA,
                                    __FILE__, __LINE__);
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findOp(name);
    if (op && name.getNamespace() == "aten" &&
        op->hasKernelForDispatchKey(c10::DispatchKey::SparseCPU)) {
      sparse_aten.impl(c10::toString(name).c_str(), any_operator());
    }
  }
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  c10::DataPtr memory = allocator.allocate(bytes);
  memory.unsafe_set_device(storage.device());
  std::memcpy(memory.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.set_data_ptr_noswap(std::move(memory));
  storage.set_nbytes(bytes);
}

}  // namespace fake_device
