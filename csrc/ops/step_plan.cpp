// StepPlan, part 1: build the plan from Python's objects, and notice when they changed.
#include "step_plan.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "../cpu/threads.h"
#include "step_plan_active.h"

namespace braze {
namespace {

const void* storage_memory(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl()->data();
}

}  // namespace

StepPlan::StepPlan(const std::string& algorithm, std::string owner)
    : algorithm_(algorithm == "adam" ? Algorithm::adam : Algorithm::sgd), owner_(std::move(owner)) {
  TORCH_CHECK_VALUE(algorithm == "adam" || algorithm == "sgd",
                    "algorithm must be 'adam' or 'sgd', got '", algorithm, "'");
  batches_.resize(1);
}

StepPlan::~StepPlan() = default;

void StepPlan::reset() {
  Guard guard(*this);
  drop();
}

void StepPlan::drop() {
  slots_.clear();
  dims_.clear();
  spare_sums_.clear();
  owners_.clear();
  footprints_.clear();
  spans_.clear();
  readers_.clear();
  active_.clear();
  settled_findings_.clear();
  for (Batch& batch : batches_) batch.key.clear();
  snapshot_.clear();
}

int StepPlan::traverse(visitproc visit, void* arg) const {
  if (const int result = snapshot_.traverse(visit, arg)) return result;
  for (const GroupReader& reader : readers_) {
    if (const int result = reader.traverse(visit, arg)) return result;
  }
  return 0;
}

PyObject* StepPlan::state_key(int k) const {
  if (algorithm_ == Algorithm::sgd) return keys().momentum_buffer;
  return k == 0 ? keys().exp_avg : k == 1 ? keys().exp_avg_sq : keys().max_exp_avg_sq;
}

int StepPlan::max_states() const { return algorithm_ == Algorithm::adam ? 3 : 1; }

int StepPlan::num_states(const GroupOptions& options) const {
  if (algorithm_ == Algorithm::adam) return options.amsgrad ? 3 : 2;
  return options.momentum != 0 ? 1 : 0;
}

std::string StepPlan::name_of(const Slot& slot) const {
  std::string text = "param_groups[" + std::to_string(slot.group) + "]['params'][" +
                     std::to_string(slot.index) + "]";
  PyObject* group = PyList_GetItem(groups_, slot.group);
  PyObject* names = group == nullptr ? nullptr : PyDict_GetItemWithError(group, keys().param_names);
  if (names != nullptr && PyList_Check(names) && slot.index < PyList_GET_SIZE(names)) {
    const char* name = PyUnicode_AsUTF8(PyList_GET_ITEM(names, slot.index));
    if (name != nullptr) text += std::string(" ('") + name + "')";
  }
  PyErr_Clear();
  return text;
}

__attribute__((always_inline)) inline bool StepPlan::same_geometry(const Geometry& geometry,
                                                                   const at::Tensor& tensor) const {
  const at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const c10::IntArrayRef sizes = impl->sizes(), strides = impl->strides();
  const size_t ndim = static_cast<size_t>(geometry.ndim);
  if (sizes.size() != ndim) return false;
  const int64_t* seen = dims_.data() + geometry.offset;
  int64_t differences = 0;
  for (size_t d = 0; d < ndim; ++d) {
    differences |= (sizes[d] ^ seen[d]) | (strides[d] ^ seen[ndim + d]);
  }
  return differences == 0;
}

void StepPlan::see(SeenTensor& entry, PyObject* object, const Geometry* known) {
  const at::Tensor& tensor = THPVariable_Unpack(object);
  entry.object = object;
  entry.data = tensor.const_data_ptr();
  entry.storage = storage_memory(tensor);
  entry.dtype = tensor.scalar_type();
  entry.keys = tensor.key_set();
  if (known != nullptr) {
    entry.geometry = *known;
  } else if (!same_geometry(entry.geometry, tensor)) {
    entry.geometry = {static_cast<int32_t>(dims_.size()), static_cast<int32_t>(tensor.dim())};
    dims_.insert(dims_.end(), tensor.sizes().begin(), tensor.sizes().end());
    dims_.insert(dims_.end(), tensor.strides().begin(), tensor.strides().end());
  }
}

void StepPlan::adopt_state(Slot& slot, SeenTensor& entry, PyObject* object, PyObject* key) {
  if (entry.object == object) return;
  const char* name = PyUnicode_AsUTF8(key);
  TORCH_CHECK_TYPE(THPVariable_Check(object), owner_, ": state['", name, "'] of ", name_of(slot),
                   " must be a tensor, got ", Py_TYPE(object)->tp_name);
  const at::Tensor& param = THPVariable_Unpack(slot.param.object);
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (tensor.is_conj() || tensor.is_neg()) {
    slot.obstacle = "subclass";
    return;
  }
  const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
  if (tensor.is_sparse() && grad.defined() && grad.is_sparse()) {  // torch's own code made it
    slot.obstacle = "sparse";
    return;
  }
  const bool counts = &entry == &slot.step;  // which the CPU may keep for any device
  TORCH_CHECK_VALUE(
      is_plain(tensor) && (tensor.device() == param.device() || (counts && tensor.is_cpu())),
      owner_, ": state['", name, "'] of ", name_of(slot), " must be a dense tensor on ",
      param.device(), counts && !param.is_cpu() ? " or cpu" : "", ", got ", tensor.toString(),
      " on ", tensor.device());
  const c10::ScalarType dtype = tensor.scalar_type();
  if (counts) {
    TORCH_CHECK_TYPE(tensor.numel() == 1 &&
                         (dtype == c10::ScalarType::Float || dtype == c10::ScalarType::Double),
                     owner_, ": state['step'] of ", name_of(slot),
                     " must be a one-element tensor of float32 or float64, got ", dtype,
                     " of shape ", tensor.sizes());
    see(entry, object, nullptr);
    return;
  }
  TORCH_CHECK_VALUE(tensor.sizes() == param.sizes(), owner_, ": state['", name, "'] of ",
                    name_of(slot), " must have the parameter's shape ", param.sizes(), ", got ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(real_dtype(dtype) && tensor.is_complex() == param.is_complex(), owner_,
                   ": state['", name, "'] of ", name_of(slot), " has dtype ", dtype,
                   ", which cannot go with a parameter of dtype ", param.scalar_type());
  TORCH_CHECK_VALUE(tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, owner_,
                    ": the memory of state['", name, "'] of ", name_of(slot), " has been freed");
  TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense() ||
                        is_non_overlapping(tensor.sizes().vec(), tensor.strides().vec()),
                    owner_, ": elements of state['", name, "'] of ", name_of(slot), " (strides ",
                    tensor.strides(), ") share memory with each other; clone it");
  // Same dimensions as the parameter's: compare with those, they are in the cache.
  const bool alike = tensor.strides() == param.strides();
  see(entry, object, alike ? &slot.param.geometry : nullptr);
  slot.linear = slot.linear && same_order(param, tensor);
}

void StepPlan::adopt_states(Slot& slot) {
  if (slot.state_dict == nullptr) return;
  const auto adopt = [&](SeenTensor& entry, PyObject* key) {
    PyObject* object = dict_get(slot.state_dict, key);
    if (object != nullptr && object != Py_None) adopt_state(slot, entry, object, key);
  };
  for (int k = 0; k < max_states(); ++k) adopt(slot.state[k], state_key(k));
  if (algorithm_ == Algorithm::adam) adopt(slot.step, keys().step);
  adopt(slot.sum, keys().grad_sum);
  slot.in_window = dict_get(slot.state_dict, keys().in_window) != nullptr;
}

void StepPlan::build_slot(Slot& slot, PyObject* state) {
  TORCH_CHECK_TYPE(THPVariable_Check(slot.param.object), owner_, ": ", name_of(slot),
                   " must be a tensor, got ", Py_TYPE(slot.param.object)->tp_name);
  const at::Tensor& param = THPVariable_Unpack(slot.param.object);
  if (param.is_meta()) {
    slot.obstacle = "meta";
  } else if (param.key_set().has(c10::DispatchKey::Python)) {
    slot.obstacle = "subclass";
  } else if (!param.is_cpu() && device_place(param).backend == nullptr) {
    slot.obstacle = param.is_cuda() ? "cuda" : "device";
  } else if (param.layout() != c10::kStrided) {
    slot.obstacle = "sparse";
  } else if (!real_dtype(param.scalar_type())) {
    slot.obstacle = "dtype";
  } else if (!is_plain(param)) {
    slot.obstacle = "subclass";
  }
  if (slot.obstacle != nullptr) return;
  slot.batch = batch_of(param);
  any_on_cpu_ = any_on_cpu_ || slot.batch == 0;
  see(slot.param, slot.param.object, nullptr);
  slot.real = *real_dtype(param.scalar_type());
  slot.numel = param.numel() * (param.is_complex() ? 2 : 1);
  slot.linear = param.is_non_overlapping_and_dense();
  TORCH_CHECK_VALUE(slot.linear || is_non_overlapping(param.sizes().vec(), param.strides().vec()),
                    owner_, ": elements of ", name_of(slot), " (shape ", param.sizes(),
                    ", strides ", param.strides(), ") share memory with each other, so a step ",
                    "would update them more than once; pass a contiguous tensor, for example ",
                    "param.clone()");
  PyObject* inner = dict_get(state, slot.param.object);
  if (inner == nullptr) return;
  TORCH_CHECK_TYPE(PyDict_Check(inner), owner_, ": state of ", name_of(slot),
                   " must be a dict, got ", Py_TYPE(inner)->tp_name);
  slot.state_dict = inner;
  adopt_states(slot);
}

void StepPlan::build(PyObject* groups, PyObject* state) {
  drop();
  any_on_cpu_ = false;
  try {
    snapshot_.record(groups, state);
    const Py_ssize_t num_groups = PyList_GET_SIZE(groups);
    readers_.resize(static_cast<size_t>(num_groups));
    for (Py_ssize_t g = 0; g < num_groups; ++g) {
      PyObject* params = dict_get(PyList_GET_ITEM(groups, g), keys().params);
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
        Slot& slot = slots_.emplace_back();
        slot.param.object = PyList_GET_ITEM(params, i);
        slot.group = static_cast<int32_t>(g);
        slot.index = static_cast<int32_t>(i);
        build_slot(slot, state);
      }
    }
    check_overlap();
    spare_sums_.resize(slots_.size());
    ++rebuilds_;
  } catch (...) {
    drop();
    throw;
  }
}

bool StepPlan::unchanged(const SeenTensor& entry) const {
  if (entry.object == nullptr) return true;
  const at::Tensor& tensor = THPVariable_Unpack(entry.object);
  const at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (!same_geometry(entry.geometry, tensor) || impl->key_set() != entry.keys ||
      c10::typeMetaToScalarType(impl->dtype()) != entry.dtype) {
    return false;
  }
  const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  const char* memory = storage == nullptr ? nullptr : static_cast<const char*>(storage->data());
  const int64_t offset = impl->storage_offset() * static_cast<int64_t>(impl->itemsize());
  return memory == entry.storage && (entry.data == nullptr || memory + offset == entry.data);
}

bool StepPlan::unchanged(const Slot& slot) const {
  if (slot.obstacle != nullptr) return false;
  if (!unchanged(slot.param) || !unchanged(slot.step) || !unchanged(slot.sum)) return false;
  for (int k = 0; k < max_states(); ++k) {
    if (!unchanged(slot.state[k])) return false;
  }
  return true;
}

// The check below follows object -> TensorImpl -> StorageImpl for every tensor, all of it usually
// out of cache after a backward pass. Walking those chains some slots ahead hides most of the
// misses.
void StepPlan::prefetch(size_t i) const {
  constexpr size_t kObject = 12, kImpl = 8, kStorage = 4;
  const auto each = [&](size_t at, auto&& visit) {
    if (at >= slots_.size() || slots_[at].obstacle != nullptr) return;
    const Slot& slot = slots_[at];
    visit(slot.param);
    for (int k = 0; k < max_states(); ++k) visit(slot.state[k]);
    visit(slot.step);
  };
  each(i + kObject, [](const SeenTensor& entry) {
    __builtin_prefetch(entry.object);  // a hint: null and stale addresses are harmless
  });
  each(i + kImpl, [](const SeenTensor& entry) {
    if (entry.object == nullptr) return;
    const char* impl =
        reinterpret_cast<const char*>(THPVariable_Unpack(entry.object).unsafeGetTensorImpl());
    __builtin_prefetch(impl);
    __builtin_prefetch(impl + 64);
    __builtin_prefetch(impl + 128);
  });
  each(i + kStorage, [](const SeenTensor& entry) {
    if (entry.object == nullptr) return;
    const at::TensorImpl* impl = THPVariable_Unpack(entry.object).unsafeGetTensorImpl();
    __builtin_prefetch(impl->unsafe_storage().unsafeGetStorageImpl());
  });
  if (i + kStorage < slots_.size()) {
    const at::TensorImpl* impl =
        THPVariable_Unpack(slots_[i + kStorage].param.object).unsafeGetTensorImpl();
    __builtin_prefetch(impl->autograd_meta());
  }
  if (i + 2 < slots_.size()) {
    const at::Tensor& grad =
        THPVariable_Unpack(slots_[i + 2].param.object).unsafeGetTensorImpl()->grad();
    const char* impl = reinterpret_cast<const char*>(grad.unsafeGetTensorImpl());
    __builtin_prefetch(impl);
    __builtin_prefetch(impl + 64);
    __builtin_prefetch(impl + 128);
  }
}

// Reads only, and touches no Python reference count: any thread may run it while the caller holds
// the GIL.
void StepPlan::gather_slot(size_t i) {
  prefetch(i);
  const Slot& slot = slots_[i];
  const at::Tensor& param = THPVariable_Unpack(slot.param.object);
  const at::TensorImpl* impl = param.unsafeGetTensorImpl();
  const at::Tensor& grad = impl->grad();
  Gathered& out = gathered_[i];
  out.grad = &grad;
  if (slot.obstacle == nullptr && !unchanged(slot)) {
    out.finding = Finding::stale;
    return;
  }
  if (!grad.defined()) {
    out.finding = Finding::no_gradient;
    return;
  }
  const at::TensorImpl* grad_impl = grad.unsafeGetTensorImpl();
  if (slot.obstacle != nullptr || grad_impl->key_set() != impl->key_set() ||
      grad_impl->dtype() != impl->dtype() || grad_impl->device() != impl->device() ||
      grad_impl->sizes() != impl->sizes()) {
    out.finding = Finding::unusual;
    return;
  }
  out.finding = grad_impl->strides() == impl->strides() || same_order(param, grad)
                    ? Finding::usual
                    : Finding::other_order;
}

// Looks up every gradient and, while at it, whether any tensor changed under the plan. `compare`
// runs on the calling thread beside it, for it needs the GIL. True if nothing changed.
template <class Compare>
bool StepPlan::gather(Compare compare) {
  constexpr size_t kBatch = 32;           // slots
  constexpr size_t kParallelSlots = 512;  // below, a second thread costs more than it saves
  const size_t count = slots_.size();
  gathered_.resize(count);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t begin; (begin = next.fetch_add(kBatch, std::memory_order_relaxed)) < count;) {
      const size_t end = std::min(begin + kBatch, count);
      for (size_t i = begin; i < end; ++i) gather_slot(i);
    }
  };
  bool same = true;
  // A step on a device is meant to run beside busy CPU cores, where a parallel region waits for the
  // slowest.
  const bool small = count < kParallelSlots || !any_on_cpu_;
  const int threads = small ? 1 : cpu::usable_threads(at::get_num_threads());
  if (threads == 1) {
    same = compare();
    if (same) work();
  } else {
    std::exception_ptr error;  // must not leave the parallel region
#pragma omp parallel num_threads(threads)
    {
#pragma omp master
      {
        try {
          same = compare();
        } catch (...) {
          error = std::current_exception();
        }
      }
      work();
    }
    if (error) std::rethrow_exception(error);
  }
  return same && std::none_of(gathered_.begin(), gathered_.end(), [](const Gathered& gathered) {
           return gathered.finding == Finding::stale;
         });
}

void StepPlan::refresh(PyObject* groups, PyObject* state) {
  groups_ = groups;
  // An obstacle may have gone (to_empty(), .to()), which only a new build can tell.
  const bool obstacles = std::any_of(slots_.begin(), slots_.end(),
                                     [](const Slot& slot) { return slot.obstacle != nullptr; });
  if (snapshot_.empty() || obstacles || !gather([&] { return snapshot_.matches(groups, state); })) {
    build(groups, state);
    gather([] { return true; });
  }
  options_.resize(readers_.size());
  for (size_t g = 0; g < readers_.size(); ++g) {
    options_[g] =
        readers_[g].read(PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(g)), g, algorithm_);
  }
}

}  // namespace braze
