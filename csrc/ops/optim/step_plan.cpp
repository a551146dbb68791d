// One call, from gradients to launches. Everything that can fail comes before the first write.
#include "step_plan.h"

#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <cmath>

#include "../../math/gradient.h"
#include "../measured.h"

namespace braze {
namespace {

// A mode that watches operators (make_fx, a FakeTensor, a counter) must see those of the step.
bool watched() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

}  // namespace

// The GIL is given up while waiting: the other thread may need it to finish.
class StepPlan::Guard {
 public:
  explicit Guard(StepPlan& plan) : plan_(plan) {
    TORCH_CHECK(plan.holder_ != std::this_thread::get_id(), plan.parameters_.owner,
                ": step() was called from inside its own step()");
    if (!plan.mutex_.try_lock()) {
      const GilReleased released;
      plan.mutex_.lock();
    }
    plan.holder_ = std::this_thread::get_id();
  }
  ~Guard() {
    for (DeviceWork& work : plan_.work_) work.release();
    plan_.gradients_.release();
    plan_.states_.commit();
    plan_.parameters_.groups = nullptr;
    plan_.holder_ = {};
    plan_.mutex_.unlock();
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  StepPlan& plan_;
};

StepPlan::StepPlan(const std::string& rule, std::string owner)
    : parameters_(rule_named(rule), std::move(owner)) {}

StepPlan::~StepPlan() = default;

void StepPlan::reset() {
  Guard guard(*this);
  forget();
}

void StepPlan::forget() {
  parameters_.clear();
  written_.clear();
  gradients_.clear();
  states_.reset(0);
  for (DeviceWork& work : work_) work.forget();
}

// What is built is of these objects as they are now, and every gradient is looked up.
void StepPlan::refresh(PyObject* groups, PyObject* state) {
  parameters_.groups = groups;
  const auto same_objects = [&] { return parameters_.same_objects(state); };
  if (parameters_.needs_build() || !gradients_.look_up(parameters_, same_objects)) {
    forget();
    try {
      parameters_.build(groups, state);
      written_.collect(parameters_);
    } catch (...) {
      forget();
      throw;
    }
    states_.reset(parameters_.slots.size());
    while (work_.size() < parameters_.devices.size()) {
      work_.emplace_back(parameters_.devices[work_.size()]);
    }
    ++parameters_.builds;
    gradients_.look_up(parameters_, [] { return true; });
  }
  parameters_.read_options();
}

// Active slots of one device side by side, and each device's share of them.
void StepPlan::share_out() {
  std::vector<Active>& active = gradients_.active;
  const auto before = [](const Active& a, const Active& b) {
    return a.slot->device < b.slot->device;
  };
  if (!gradients_.repeating && !std::is_sorted(active.begin(), active.end(), before)) {
    std::stable_sort(active.begin(), active.end(), before);
  }
  size_t begin = 0;
  for (size_t device = 0; device < work_.size(); ++device) {
    size_t end = begin;
    while (end < active.size() && active[end].slot->device == static_cast<int32_t>(device)) ++end;
    work_[device].active = std::span(active).subspan(begin, end - begin);
    begin = end;
  }
}

// A GradScaler's tensors stay on the device if every kernel can read them and no later decision
// hangs on them here; otherwise their values are waited for. False if they tell of an overflow.
bool StepPlan::resolve_loss_scale(StepScalars& scalars, bool window) const {
  if (scalars.amp.grad_scale == nullptr && scalars.amp.found_inf == nullptr &&
      !scalars.find_overflow) {
    return true;
  }
  const auto readable = [](const at::Tensor* tensor) {
    return tensor == nullptr ||
           (tensor->scalar_type() == c10::ScalarType::Float && tensor->numel() == 1);
  };
  bool deferred = !window && readable(scalars.amp.grad_scale) && readable(scalars.amp.found_inf);
  const RuleInfo& rule = parameters_.rule;
  for (const DeviceWork& work : work_) {
    for (const Active& a : work.active) {
      if (!deferred) break;
      // What is overwritten, as an average is, starts with the first step that is not skipped.
      const GroupOptions& options = parameters_.options(*a.slot);
      const bool overwritten = rule.first_overwrites && (options.states & 1) != 0 &&
                               a.slot->state[0].tensor == nullptr &&
                               !rule.zeros_serve(options.values);
      const bool starts = overwritten || (scalars.averages() && a.slot->average.tensor == nullptr);
      deferred = !work.on_cpu() && !starts &&
                 (!rule.counts_steps || parameters_.counts_on_device(*a.slot));
    }
  }
  scalars.deferred = deferred;
  if (deferred) return true;
  if (scalars.amp.found_inf != nullptr && scalars.amp.found_inf->item().toDouble() != 0) {
    return false;
  }
  if (scalars.amp.grad_scale != nullptr) {
    scalars.grad_scale = 1 / scalars.amp.grad_scale->item().toDouble();
  }
  scalars.amp = {};
  return true;
}

// A graph replays the launch, not this code: nothing that changes from step to step may be decided
// here.
void StepPlan::check_capture() const {
  for (const DeviceWork& work : work_) {
    if (!work.capturing()) continue;
    TORCH_CHECK(
        std::none_of(work.active.begin(), work.active.end(),
                     [](const Active& a) { return a.counted; }),
        "Attempting CUDA graph capture of step() for an instance of ", parameters_.owner,
        " whose step counts the CPU keeps: param_groups' capturable is False. Construct it ",
        "with capturable=True");
  }
}

void StepPlan::create_states(PyObject* state, const Destination& destination) {
  const auto refuse_capture = [&] {
    for (const DeviceWork& work : work_) {
      TORCH_CHECK(
          !work.capturing(), parameters_.owner,
          ": the state of a parameter does not exist yet, and a CUDA graph that makes it ",
          "would reset it at every replay; run one step on a side stream before the capture ",
          "(warm-up)");
    }
  };
  const bool allocated =
      states_.create(parameters_, state, gradients_.active, destination, refuse_capture);
  // So that a gradient in this memory is refused from now on.
  if (allocated) written_.collect(parameters_);
}

template <class Body>
void StepPlan::undo_states_on_failure(PyObject* state, Body body) {
  for (DeviceWork& work : work_) work.launched = false;
  try {
    body();
  } catch (...) {
    const auto in_use = [&](int32_t device) { return work_[static_cast<size_t>(device)].launched; };
    if (states_.undo(state, in_use)) forget();
    throw;
  }
}

// The norm of all gradients, where it is known, and what hangs on it.
void StepPlan::measure(StepScalars& scalars, DeviceScale& scale) {
  std::vector<Measured> measured;
  double squares = 0;
  for (DeviceWork& work : work_) {
    if (work.active.empty()) continue;
    if (work.on_cpu()) {
      squares += work.measure_on_cpu(scalars);
    } else {
      measured.push_back(work.measure_on_device(parameters_, scalars));
    }
  }
  norm_scale_ = scalars.norm_scale();
  scaled_on_device_ = scalars.amp.grad_scale != nullptr;
  bool finite = true;
  if (scalars.norm_on_device) {
    const Measured all = combined(measured, norm_scale_, scalars.amp.grad_scale);
    norm_ = all.norm;
    found_inf_ = all.found_inf;
    all_squares_ = all.squares;
    if (scalars.norm_decides()) scale.squares = &all_squares_;
    if (scalars.refuse_overflow && !scalars.find_overflow) {
      finite = found_inf_.item().toDouble() == 0;
    }
  } else {
    for (const Measured& m : measured) squares += m.squares.item().toDouble();
    finite = std::isfinite(squares);
    const double norm = std::sqrt(squares) * norm_scale_;
    if (!host_norm_.defined()) {
      host_norm_ = at::zeros({}, c10::kFloat);
      host_found_inf_ = at::zeros({1}, c10::kFloat);
    }
    *host_norm_.mutable_data_ptr<float>() = static_cast<float>(norm);
    *host_found_inf_.mutable_data_ptr<float>() = finite ? 0.0f : 1.0f;
    norm_ = host_norm_;
    found_inf_ = host_found_inf_;
    scalars.overflowed = scalars.find_overflow && !finite;
    if (scalars.max_norm >= 0) scalars.coefficient = clip_coefficient(norm, scalars.max_norm);
  }
  TORCH_CHECK(finite || !scalars.refuse_overflow || scalars.find_overflow, parameters_.owner,
              ": the norm of the gradients is not finite, so they cannot be clipped, and ",
              "error_if_nonfinite=True; nothing was changed");
}

// What is decided is done. "", "deferred", or "overflow": measured gradients are not finite, and
// nothing changed.
std::string StepPlan::carry_out(PyObject* state, StepScalars& scalars) {
  const bool on_cpu = std::any_of(work_.begin(), work_.end(), [](const DeviceWork& work) {
    return work.on_cpu() && !work.active.empty();
  });
  scalars.norm_on_device = !on_cpu && (!scalars.find_overflow || scalars.deferred);
  const Destination destination{.averages = scalars.averages()};
  undo_states_on_failure(state, [&] {
    if (!gradients_.repeating) create_states(state, destination);
    const auto choose_hypers = [&](bool again) {
      for (DeviceWork& work : work_) work.choose_hypers(parameters_, scalars, again);
    };
    choose_hypers(gradients_.repeating);
    check_capture();
    for (DeviceWork& work : work_) work.fill(parameters_, destination, gradients_.repeating);
    DeviceScale scale;
    scale.max_norm = scalars.max_norm;
    scale.skip_overflow = scalars.find_overflow;
    if (scalars.measures()) measure(scalars, scale);
    if (scalars.overflowed) return;
    if (scalars.coefficient != 1) choose_hypers(true);
    for (DeviceWork& work : work_) {
      work.launch(parameters_, destination, scalars, scale);
      work.count_step();
    }
  });
  has_statistics_ = scalars.statistics;
  if (scalars.overflowed) {
    if (states_.undo(state, [](int32_t) { return false; })) forget();
    return "overflow";
  }
  return scalars.deferred ? "deferred" : "";
}

std::vector<StepPlan::Statistics> StepPlan::statistics() {
  Guard guard(*this);
  if (!has_statistics_) return {};
  std::vector<Statistics> result;
  double squares = 0;
  for (DeviceWork& work : work_) {
    for (const auto& [index, sums] : work.sums()) {
      const Slot& slot = parameters_.slots[index];
      squares += sums.squares;
      result.push_back({slot.object, slot.numel, norm_scale_, sums});
    }
  }
  // A loss scale that only the device knew is in the norm.
  const double scale = scaled_on_device_ ? norm_.item().toDouble() / std::sqrt(squares) : 0;
  if (std::isfinite(scale) && scale > 0) {
    for (Statistics& s : result) s.scale = scale;
  }
  return result;
}

std::string StepPlan::step(PyObject* groups, PyObject* state, StepScalars scalars) {
  if (watched()) return "mode";
  Guard guard(*this);
  has_statistics_ = false;
  parameters_.device_counts = scalars.device_counts;
  refresh(groups, state);
  const bool window = scalars.window_weight >= 0;
  const Destination destination{.averages = scalars.averages()};
  const bool may_repeat = !window && destination == last_;
  last_ = destination;
  const std::string reason = gradients_.choose(parameters_, written_, window, may_repeat);
  if (!reason.empty()) return reason;
  const std::vector<Active>& active = gradients_.active;
  if (active.empty()) return "none";
  if (window && scalars.mean) {
    const bool present = std::any_of(active.begin(), active.end(),
                                     [](const Active& a) { return a.grad != nullptr; });
    scalars.divisor = scalars.window_weight + (present || scalars.counts ? 1 : 0);
    TORCH_CHECK_VALUE(scalars.divisor != 0, parameters_.owner,
                      ": the weights of the accumulated gradients sum to 0");
  }
  share_out();
  if (!resolve_loss_scale(scalars, window)) return "overflow";
  const std::string result = carry_out(state, scalars);
  if (result == "overflow") return result;
  if (window) states_.leave_window(parameters_, state);
  const bool repeatable = std::all_of(active.begin(), active.end(), [](const Active& a) {
    return a.repeatable && !a.first && !a.first_average;
  });
  if (!window && repeatable) gradients_.remember(parameters_);
  return result;
}

std::string StepPlan::fold(PyObject* groups, PyObject* state, double weight, bool into_state) {
  if (watched()) return "mode";
  Guard guard(*this);
  has_statistics_ = false;
  refresh(groups, state);
  const std::string reason = gradients_.choose(parameters_, written_, false, false);
  if (!reason.empty()) return reason;
  if (gradients_.active.empty()) return "none";
  share_out();
  for (const DeviceWork& work : work_) {
    TORCH_CHECK(!work.capturing(), parameters_.owner,
                ": accumulation counts its micro-batches on the CPU and cannot be captured ",
                "into a CUDA graph");
  }
  const Destination destination{.fold = true, .into_state = into_state};
  undo_states_on_failure(state, [&] {
    create_states(state, destination);
    for (DeviceWork& work : work_) work.choose_hypers(parameters_, destination, weight);
    for (DeviceWork& work : work_) work.fill(parameters_, destination, false);
    for (DeviceWork& work : work_) work.launch(parameters_, destination, {}, {});
  });
  std::vector<Slot*> entering;
  for (const Active& a : gradients_.active) {
    if (sums_in_state(parameters_, *a.slot, destination) && !a.slot->in_window) {
      entering.push_back(a.slot);
    }
    a.slot->param.tensor->unsafeGetTensorImpl()->mutable_grad().reset();
  }
  states_.enter_window(parameters_, state, entering);
  return "";
}

}  // namespace braze
