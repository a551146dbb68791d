#include "clip.h"

#include <ATen/Parallel.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>

#include "../cpu/optimizer_cpu.h"
#include "../math/gradient.h"
#include "measured.h"
#include "tensor_work.h"

namespace braze {
namespace {

bool takes(const std::vector<at::Tensor>& gradients) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  spans.reserve(gradients.size());
  for (const at::Tensor& g : gradients) {
    const bool has_kernels = g.is_cpu() || device_place(g).backend != nullptr;
    if (!has_kernels || !is_plain(g) || !real_dtype(g.scalar_type())) return false;
    if (g.is_inference() && !c10::InferenceMode::is_enabled()) return false;
    if (g.numel() == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(g.const_data_ptr());
    if (g.is_non_overlapping_and_dense()) {
      spans.emplace_back(begin, begin + g.nbytes());
      continue;
    }
    const Footprint walked = footprint(g);
    if (!is_non_overlapping(walked.sizes, walked.strides)) return false;
    spans.emplace_back(begin, walked.end());
  }
  // Those that share memory would be scaled twice, and by several threads.
  // backward() made them one after another, mostly: in this order or the opposite.
  if (!std::is_sorted(spans.rbegin(), spans.rend()) &&
      !std::is_sorted(spans.begin(), spans.end())) {
    std::sort(spans.begin(), spans.end());
  }
  for (size_t i = 1; i < spans.size(); ++i) {
    const auto& [first, second] = std::minmax(spans[i - 1], spans[i]);
    if (second.first < first.second) return false;
  }
  return true;
}

// The gradients of one device, each its own parameter.
class Share {
 public:
  Share(DevicePlace place, c10::Device device) : place_(place), device_(device) {}

  bool on_cpu() const { return place_.backend == nullptr; }
  bool is_at(const DevicePlace& place) const {
    return place_.backend == place.backend && place_.index == place.index;
  }
  void add(const at::Tensor& gradient) {
    TensorWork& work = tensors_.emplace_back();
    if (gradient.is_non_overlapping_and_dense()) {
      work.numel = gradient.numel() * (gradient.is_complex() ? 2 : 1);
      work.param = work.grad = linear_operand(gradient);
    } else {
      lay_out(work, {{&gradient, &work.param}, {&gradient, &work.grad}}, layouts_);
    }
    work.is_double = work.param.dtype == DType::f64;
  }

  double measure_on_cpu() {
    chunks_.build(tensors_);
    std::vector<GradientSums> sums;
    return cpu::measure_gradients(tensors_, chunks_, 1, false, at::get_num_threads(), sums);
  }
  Measured measure_on_device() {
    decide_on_device({});
    return step().measure({tensors_, next_generation()}, view_of(device_hypers_), 1, {});
  }

  void clip(const Clip::Options& options, double factor) {
    const std::vector<Hyper<Clip>> hypers = {make_hyper<Clip>(options, {.grad_scale = factor})};
    if (!on_cpu()) {
      step().launch({tensors_, next_generation()}, view_of(hypers), {});
      return;
    }
    if (chunks_.chunks.empty()) chunks_.build(tensors_);
    cpu::update_tensors(tensors_, chunks_, view_of(hypers), at::get_num_threads());
  }
  // By a norm that only the device knows.
  void clip(const at::Tensor& squares, double max_norm) {
    const at::Tensor here = squares.to(device_, squares.scalar_type(), /*non_blocking=*/true);
    DeviceScale scale;
    scale.squares = &here;
    scale.max_norm = max_norm;
    decide_on_device({});
    step().launch({tensors_, next_generation()}, view_of(device_hypers_), scale);
  }

 private:
  void decide_on_device(const Clip::Options& options) {
    device_hypers_ = {DeviceHyper<Clip>{.options = options, .inputs = {}, .scalars = {}}};
  }
  static int64_t next_generation() {
    static int64_t generation = 0;
    return ++generation;
  }
  // One for each device, for all calls; never destroyed, for its driver may be gone by then.
  DeviceStep& step() const {
    static auto* const steps =
        new std::map<std::pair<const DeviceBackend*, int>, std::unique_ptr<DeviceStep>>;
    std::unique_ptr<DeviceStep>& step = (*steps)[{place_.backend, place_.index}];
    if (!step) step = place_.backend->make_step(place_.index, "clip_grad_norm_");
    return *step;
  }

  DevicePlace place_;
  c10::Device device_;
  std::vector<TensorWork> tensors_;
  std::deque<Layout> layouts_;
  ChunkList chunks_;
  std::vector<DeviceHyper<Clip>> device_hypers_;
};

// One call at a time: the devices' steps serve all.
std::mutex& calls() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

std::vector<Share> share_out(const std::vector<at::Tensor>& gradients) {
  std::vector<Share> shares;
  for (const at::Tensor& g : gradients) {
    const DevicePlace place = device_place(g);
    auto share =
        std::find_if(shares.begin(), shares.end(), [&](const Share& s) { return s.is_at(place); });
    if (share == shares.end()) share = shares.emplace(shares.end(), place, g.device());
    share->add(g);
  }
  return shares;
}

void bump_versions(const std::vector<at::Tensor>& gradients) {
  for (const at::Tensor& g : gradients) g.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

std::optional<at::Tensor> clip_to_norm(const std::vector<at::Tensor>& gradients, double max_norm,
                                       bool refuse) {
  if (gradients.empty() || !takes(gradients)) return std::nullopt;
  const std::lock_guard lock(calls());
  c10::ScalarType dtype = c10::toRealValueType(gradients.front().scalar_type());
  for (const at::Tensor& g : gradients) {
    dtype = c10::promoteTypes(dtype, c10::toRealValueType(g.scalar_type()));
  }
  std::vector<Share> shares = share_out(gradients);
  const c10::Device device = gradients.front().device();
  std::vector<Measured> measured;
  double squares = 0;
  for (Share& share : shares) {
    share.on_cpu() ? void(squares += share.measure_on_cpu())
                   : measured.push_back(share.measure_on_device());
  }
  const bool clips = max_norm >= 0;
  if (measured.size() == shares.size()) {
    const Measured all = combined(measured, 1, nullptr);
    if (refuse && all.found_inf.item().toDouble() != 0) return std::nullopt;
    const at::Tensor wide = dtype == c10::kDouble ? all.squares.sum().sqrt() : all.norm;
    const at::Tensor norm = wide.to(device, dtype, /*non_blocking=*/false, /*copy=*/true);
    for (Share& share : shares) {
      if (clips) share.clip(all.squares, max_norm);
    }
    if (clips) bump_versions(gradients);
    return norm;
  }
  for (const Measured& m : measured) squares += m.squares.item().toDouble();
  const double norm = std::sqrt(squares);
  if (refuse && !std::isfinite(norm)) return std::nullopt;
  const double factor = clips ? clip_coefficient(norm, max_norm) : 1;
  for (Share& share : shares) {
    if (factor != 1) share.clip(Clip::Options{}, factor);
  }
  if (clips) bump_versions(gradients);
  return at::scalar_tensor(norm, c10::TensorOptions(device).dtype(dtype));
}

bool clip_to_value(const std::vector<at::Tensor>& gradients, double limit) {
  if (!takes(gradients)) return false;
  for (const at::Tensor& g : gradients) {
    if (g.is_complex()) return false;  // which have no order: torch says so
  }
  const std::lock_guard lock(calls());
  for (Share& share : share_out(gradients))
    share.clip(Clip::Options{.limit = limit, .by_value = true}, 1);
  bump_versions(gradients);
  return true;
}

}  // namespace braze
