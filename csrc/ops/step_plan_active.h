// Private to StepPlan: what one call works on, and the lock around a call.
#pragma once
#include "../plan/chunks.h"
#include "step_plan.h"

namespace braze {

struct StepPlan::Active {
  Slot* slot;
  const at::Tensor* grad;  // null: none present, only the open window has something for this slot
  bool linear;             // everything dense in the parameter's order
  bool first;              // what is written to holds nothing yet
  double step;             // the step count after this step (Adam)
  int32_t hyper;
  bool counted = false;     // the CPU keeps the step count (Adam)
  bool repeatable = false;  // the next step may take it over as it stands
};

struct StepPlan::Batch {
  DevicePlace place;                 // no backend: the CPU
  std::unique_ptr<DeviceStep> step;  // of the backend
  // What follows is of one call, kept for its capacity.
  size_t begin = 0, end = 0;  // active_[begin, end)
  bool launched = false;      // from here on its state counts
  std::vector<TensorWork> work;
  std::deque<Layout> layouts;
  ChunkList chunks;
  std::vector<int64_t> key;       // what work and chunks were made for
  int64_t generation = 0;         // counts how often
  bool counts_on_device = false;  // of one of its parameters at least
  bool device_hypers = false;     // the kernel makes the arguments
  std::vector<AdamHyper> adam;
  std::vector<SgdHyper> sgd;
  std::vector<FoldHyper> fold;
  std::vector<AdamDeviceHyper> adam_device;
  std::vector<SgdDeviceHyper> sgd_device;
};

// If the body fails, the entries that create_state() made go again, except where they are in use: a
// new buffer holds nothing yet, and the next step would take it for one that does.
template <class Body>
void StepPlan::undo_state_on_failure(PyObject* state, Body body) {
  for (Batch& batch : batches_) batch.launched = false;
  try {
    body();
  } catch (...) {
    undo_state(state);
    throw;
  }
}

// Without the GIL while it lives, whatever is thrown.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() { PyEval_RestoreThread(state_); }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

// One call at a time per plan. The GIL is given up while waiting: the other thread may need it to
// finish.
class StepPlan::Guard {
 public:
  explicit Guard(StepPlan& plan) : plan_(plan) {
    TORCH_CHECK(plan.holder_ != std::this_thread::get_id(), plan.owner_,
                ": step() was called from inside its own step()");
    if (!plan.mutex_.try_lock()) {
      const GilReleased released;
      plan.mutex_.lock();
    }
    plan.holder_ = std::this_thread::get_id();
  }
  ~Guard() {
    plan_.held_.clear();
    plan_.created_.clear();
    plan_.groups_ = nullptr;
    plan_.holder_ = {};
    plan_.mutex_.unlock();
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  StepPlan& plan_;
};

}  // namespace braze
