#include "gradients.h"

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "../../cpu/threads.h"
#include "../tensor_work.h"

namespace braze {
namespace {

// The comparison follows object -> TensorImpl -> StorageImpl for every tensor, all of it usually
// out of cache after a backward pass. Walking those chains some slots ahead hides most of the
// misses.
void prefetch(const Parameters& parameters, size_t i) {
  constexpr size_t kObject = 12, kImpl = 8, kStorage = 4, kGradient = 2;
  const std::vector<Slot>& slots = parameters.slots;
  const size_t num_states = parameters.rule.state_keys.size();
  const auto each = [&](size_t at, auto&& visit) {
    if (at >= slots.size() || slots[at].obstacle != nullptr) return;
    const Slot& slot = slots[at];
    visit(slot.param);
    for (size_t k = 0; k < num_states; ++k) visit(slot.state[k]);
    visit(slot.step);
  };
  const auto fetch_impl = [](const at::TensorImpl* tensor) {
    const char* impl = reinterpret_cast<const char*>(tensor);
    __builtin_prefetch(impl);
    __builtin_prefetch(impl + 64);
    __builtin_prefetch(impl + 128);
  };
  each(i + kObject, [](const SeenTensor& entry) {
    __builtin_prefetch(entry.tensor);  // a hint: null and stale addresses are harmless
  });
  each(i + kImpl, [&](const SeenTensor& entry) {
    if (entry.tensor != nullptr) fetch_impl(entry.tensor->unsafeGetTensorImpl());
  });
  each(i + kStorage, [](const SeenTensor& entry) {
    if (entry.tensor == nullptr) return;
    const at::TensorImpl* impl = entry.tensor->unsafeGetTensorImpl();
    __builtin_prefetch(impl->unsafe_storage().unsafeGetStorageImpl());
  });
  if (i + kStorage < slots.size()) {
    const at::Tensor& param = *slots[i + kStorage].param.tensor;
    __builtin_prefetch(param.unsafeGetTensorImpl()->autograd_meta());
  }
  if (i + kGradient < slots.size()) {
    const at::Tensor& param = *slots[i + kGradient].param.tensor;
    fetch_impl(param.unsafeGetTensorImpl()->grad().unsafeGetTensorImpl());
  }
}

void check_gradient(const Parameters& parameters, const WrittenMemory& written, const Slot& slot,
                    const at::Tensor& grad) {
  if (slot.numel == 0) return;
  TORCH_CHECK_VALUE(slot.param.data != nullptr && grad.const_data_ptr() != nullptr,
                    parameters.owner, ": the memory of ", parameters.name_of(slot),
                    " or of its gradient has been freed");
  written.refuse_gradient(parameters, slot, grad);
}

}  // namespace

// Reads only, and touches no Python reference count: any thread may run it while the caller holds
// the GIL.
Gradients::Found Gradients::find(const Parameters& parameters, size_t i) const {
  prefetch(parameters, i);
  const Slot& slot = parameters.slots[i];
  const at::Tensor& param = *slot.param.tensor;
  const at::TensorImpl* impl = param.unsafeGetTensorImpl();
  const at::Tensor& grad = impl->grad();
  if (slot.obstacle == nullptr && !parameters.unchanged(slot)) return {&grad, changed};
  if (!grad.defined()) return {&grad, no_gradient};
  const at::TensorImpl* grad_impl = grad.unsafeGetTensorImpl();
  if (slot.obstacle != nullptr || grad_impl->key_set() != impl->key_set() ||
      grad_impl->dtype() != impl->dtype() || grad_impl->device() != impl->device() ||
      grad_impl->sizes() != impl->sizes()) {
    return {&grad, unusual};
  }
  const bool in_order = grad_impl->strides() == impl->strides() || same_order(param, grad);
  return {&grad, in_order ? usual : other_order};
}

bool Gradients::look_up(const Parameters& parameters, const std::function<bool()>& compare) {
  constexpr size_t kShare = 32;           // slots that a thread takes at a time
  constexpr size_t kParallelSlots = 512;  // below, a second thread costs more than it saves
  const size_t count = parameters.slots.size();
  found_.resize(count);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t begin; (begin = next.fetch_add(kShare, std::memory_order_relaxed)) < count;) {
      const size_t end = std::min(begin + kShare, count);
      for (size_t i = begin; i < end; ++i) found_[i] = find(parameters, i);
    }
  };
  bool same = true;
  // A step on a device is meant to run beside busy CPU cores, where a parallel region waits for the
  // slowest.
  const bool small = count < kParallelSlots || !parameters.any_on_cpu;
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
  return same && std::none_of(found_.begin(), found_.end(),
                              [](const Found& found) { return found.finding == changed; });
}

// For a gradient that differs from its parameter in more than strides. Empty if the kernels can use
// it.
std::string Gradients::check_unusual(const Parameters& parameters, Active& active,
                                     const at::Tensor& grad) {
  const at::Tensor& param = *active.slot->param.tensor;
  const std::string& owner = parameters.owner;
  const auto name = [&] { return parameters.name_of(*active.slot); };
  if (grad.layout() != c10::kStrided) return "sparse";
  if (grad.key_set().has(c10::DispatchKey::Python)) return "subclass";
  TORCH_CHECK_VALUE(grad.device() == param.device(), owner, ": the gradient of ", name(),
                    " must be on the parameter's device ", param.device(), ", got ", grad.device());
  TORCH_CHECK_VALUE(grad.sizes() == param.sizes(), owner, ": the gradient of ", name(),
                    " must have the parameter's shape ", param.sizes(), ", got ", grad.sizes());
  TORCH_CHECK_TYPE(real_dtype(grad.scalar_type()) && grad.is_complex() == param.is_complex(), owner,
                   ": the gradient of ", name(), " has dtype ", grad.scalar_type(),
                   ", which cannot go with a parameter of dtype ", param.scalar_type());
  if (!is_plain(grad)) {
    made_.push_back(grad.resolve_conj().resolve_neg());
    active.grad = &made_.back();
    if (!is_plain(*active.grad)) return "subclass";
  }
  active.linear = same_order(param, *active.grad);
  return "";
}

void Gradients::remember(const Parameters& parameters) {
  last_build_ = parameters.builds;
  last_findings_.resize(found_.size());
  for (size_t i = 0; i < found_.size(); ++i) last_findings_[i] = found_[i].finding;
  last_needs_.clear();
  for (const GroupReader& reader : parameters.readers()) last_needs_.push_back(reader.options());
}

bool Gradients::repeats(const Parameters& parameters) const {
  const std::vector<GroupReader>& readers = parameters.readers();
  if (last_build_ != parameters.builds || last_findings_.size() != found_.size() ||
      last_needs_.size() != readers.size()) {
    return false;
  }
  for (size_t g = 0; g < readers.size(); ++g) {
    if (last_needs_[g] != readers[g].options()) return false;
  }
  bool same = true;
  for (size_t i = 0; i < found_.size(); ++i) same &= found_[i].finding == last_findings_[i];
  return same;
}

void Gradients::clear() {
  active.clear();
  last_findings_.clear();
}

std::string Gradients::choose(Parameters& parameters, const WrittenMemory& written,
                              bool include_window, bool may_repeat) {
  made_.clear();
  repeating = may_repeat && repeats(parameters);
  last_findings_.clear();  // until this step has come to its end
  if (repeating) {
    for (Active& a : active) {
      a.grad = found_[parameters.index_of(*a.slot)].grad;
      check_gradient(parameters, written, *a.slot, *a.grad);
    }
    return "";
  }
  active.clear();
  for (size_t i = 0; i < found_.size(); ++i) {
    Slot& slot = parameters.slots[i];
    const Found& found = found_[i];
    if (found.finding == no_gradient) {
      if (include_window && (slot.has_sum() || slot.in_window)) {
        active.push_back({&slot, nullptr, slot.linear});
      }
      continue;
    }
    const at::Tensor& param = *slot.param.tensor;
    if (slot.obstacle != nullptr) {
      const bool cuda = std::string(slot.obstacle) == "cuda";
      return cuda ? param.device().str() : slot.obstacle;
    }
    if (parameters.options(slot).differentiable) return "differentiable";
    TORCH_CHECK(!param.is_inference() || c10::InferenceMode::is_enabled(),
                "Inplace update to inference tensor outside InferenceMode is not allowed: ",
                parameters.owner, " cannot update ", parameters.name_of(slot),
                "; make the parameter outside torch.inference_mode()");
    const bool is_usual = found.finding == usual;
    Active& a = active.emplace_back(Active{&slot, found.grad, is_usual});
    if (found.finding == unusual) {
      if (std::string reason = check_unusual(parameters, a, *found.grad); !reason.empty()) {
        return reason;
      }
    }
    a.linear = a.linear && slot.linear;
    a.repeatable =
        is_usual && slot.linear && !slot.has_sum() && !slot.in_window && !param.is_inference();
    check_gradient(parameters, written, slot, *a.grad);
  }
  return "";
}

}  // namespace braze
