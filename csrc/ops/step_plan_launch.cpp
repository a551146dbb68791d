// StepPlan, part 6: plain work lists for each device, and the calls that carry them out.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include "../cpu/optimizer_cpu.h"
#include "step_plan_active.h"

namespace braze {
namespace {

// A step shorter than this keeps the GIL: letting go costs more than it gives to other threads.
constexpr int64_t kReleaseGilCost = 1 << 18;

const at::Tensor* tensor_of(const SeenTensor& entry) {
  return entry.object == nullptr ? nullptr : &THPVariable_Unpack(entry.object);
}

Operand operand_of(const SeenTensor& entry) {
  if (entry.object == nullptr) return {};
  return {const_cast<void*>(entry.data), nullptr, *real_dtype(entry.dtype)};
}

}  // namespace

int32_t StepPlan::batch_of(const at::Tensor& param) {
  const DevicePlace place = device_place(param);
  if (place.backend == nullptr) return 0;
  for (size_t i = 1; i < batches_.size(); ++i) {
    if (batches_[i].place.backend == place.backend && batches_[i].place.index == place.index) {
      return static_cast<int32_t>(i);
    }
  }
  batches_.emplace_back();
  batches_.back().place = place;
  return static_cast<int32_t>(batches_.size()) - 1;
}

void StepPlan::fill_work(Batch& batch, const Destination& destination) {
  const auto refill = [&] {
    for (size_t i = batch.begin; i < batch.end; ++i) {
      TensorWork& work = batch.work[i - batch.begin];
      work.hyper = active_[i].hyper;
      work.first = active_[i].first;
      if (active_[i].grad != nullptr) work.grad = linear_operand(*active_[i].grad);
    }
  };
  if (repeating_) {
    refill();
    return;
  }
  bool all_linear = true;
  work_key_scratch_.assign({rebuilds_, destination.fold, destination.into_momentum});
  for (size_t i = batch.begin; i < batch.end; ++i) {
    const Active& active = active_[i];
    const GroupOptions& o = options_[static_cast<size_t>(active.slot->group)];
    all_linear = all_linear && active.linear;
    work_key_scratch_.push_back((active.slot - slots_.data()) * 128 + active.counted * 64 +
                                active.linear * 32 + (active.grad != nullptr) * 16 +
                                (active.slot->sum.object != nullptr) * 8 + num_states(o));
  }
  if (all_linear && work_key_scratch_ == batch.key) {
    refill();
    return;
  }
  batch.layouts.clear();
  batch.work.resize(batch.end - batch.begin);
  for (size_t i = batch.begin; i < batch.end; ++i) {
    fill(batch, batch.work[i - batch.begin], active_[i], destination);
  }
  if (batch.place.backend == nullptr) batch.chunks.build(batch.work);
  batch.key.swap(work_key_scratch_);
  ++batch.generation;
}

void StepPlan::fill(Batch& batch, TensorWork& work, const Active& active,
                    const Destination& destination) {
  const Slot& slot = *active.slot;
  const SeenTensor* entries[kMaxStates] = {};
  const SeenTensor* sum = nullptr;
  if (destination.fold) {
    entries[0] = folds_into_momentum(slot, destination.into_momentum) ? &slot.state[0] : &slot.sum;
  } else {
    const int used = num_states(options_[static_cast<size_t>(slot.group)]);
    for (int k = 0; k < used; ++k) entries[k] = &slot.state[k];
    sum = &slot.sum;
  }
  work.step = destination.fold || active.counted ? Operand{} : operand_of(slot.step);
  work.hyper = active.hyper;
  work.first = active.first;
  work.is_double = slot.real == DType::f64;
  work.linear = active.linear;
  if (work.linear) {
    work.numel = slot.numel;
    work.param = {const_cast<void*>(slot.param.data), nullptr, slot.real};
    work.grad = active.grad == nullptr ? Operand{} : linear_operand(*active.grad);
    work.sum = sum == nullptr ? Operand{} : operand_of(*sum);
    for (int k = 0; k < kMaxStates; ++k) {
      work.state[k] = entries[k] == nullptr ? Operand{} : operand_of(*entries[k]);
    }
    return;
  }
  const at::Tensor* states[kMaxStates] = {};
  for (int k = 0; k < kMaxStates; ++k) {
    states[k] = entries[k] == nullptr ? nullptr : tensor_of(*entries[k]);
  }
  lay_out(work,
          {{&THPVariable_Unpack(slot.param.object), &work.param},
           {active.grad, &work.grad},
           {sum == nullptr ? nullptr : tensor_of(*sum), &work.sum},
           {states[0], &work.state[0]},
           {states[1], &work.state[1]},
           {states[2], &work.state[2]}},
          batch.layouts);
}

template <class Run>
void StepPlan::run_on_cpu(Batch& batch, Run run) {
  const int threads = at::get_num_threads();
  if (batch.chunks.cost < kReleaseGilCost) {
    run(threads);
    return;
  }
  for (const Active& active : active_) {
    if (active.grad != nullptr) held_.push_back(*active.grad);
  }
  const GilReleased released;
  run(threads);
}

void StepPlan::launch_step(Batch& batch, const StepScalars& scalars) {
  if (batch.begin == batch.end) return;
  if (batch.place.backend == nullptr) {
    batch.launched = true;
    run_on_cpu(batch, [&](int threads) {
      if (algorithm_ == Algorithm::adam) {
        cpu::adam_step(batch.work, batch.chunks, batch.adam, threads);
      } else {
        cpu::sgd_step(batch.work, batch.chunks, batch.sgd, threads);
      }
    });
    return;
  }
  if (!batch.step) batch.step = batch.place.backend->make_step(batch.place.index, owner_);
  const DeviceStep::Work work{batch.work, batch.generation};
  if (!batch.device_hypers) {
    if (algorithm_ == Algorithm::adam) {
      batch.step->adam(work, batch.adam);
    } else {
      batch.step->sgd(work, batch.sgd);
    }
    batch.launched = true;
    return;
  }
  DeviceScale scale;
  const at::Tensor& param = THPVariable_Unpack(active_[batch.begin].slot->param.object);
  const auto here = [&](const at::Tensor* tensor) -> const at::Tensor* {
    if (tensor == nullptr || tensor->device() == param.device()) return tensor;
    held_.push_back(tensor->to(param.device(), tensor->scalar_type(), /*non_blocking=*/true));
    return &held_.back();
  };
  scale.grad_scale = here(scalars.amp.grad_scale);
  scale.found_inf = here(scalars.amp.found_inf);
  if (algorithm_ == Algorithm::adam) {
    batch.step->adam(work, batch.adam_device, scale);
  } else {
    batch.step->sgd(work, batch.sgd_device, scale);
  }
  batch.launched = true;
}

void StepPlan::launch_fold(Batch& batch) {
  if (batch.begin == batch.end) return;
  if (batch.place.backend == nullptr) {
    batch.launched = true;
    run_on_cpu(batch, [&](int threads) {
      cpu::fold_gradients(batch.work, batch.chunks, batch.fold, threads);
    });
    return;
  }
  if (!batch.step) batch.step = batch.place.backend->make_step(batch.place.index, owner_);
  batch.step->fold({batch.work, batch.generation}, batch.fold);
  batch.launched = true;
}

}  // namespace braze
