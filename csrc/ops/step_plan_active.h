// Private to StepPlan: what one call works on, and the lock around a call.
#pragma once
#include "step_plan.h"

namespace braze {

struct StepPlan::Active {
  Slot* slot;
  const at::Tensor* grad;  // null: none present, only the open window has something for this slot
  bool linear;             // everything dense in the parameter's order
  bool first;              // what is written to holds nothing yet
  double step;             // the step count after this step (Adam)
  int32_t hyper;
};

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
    plan_.active_.clear();
    plan_.held_.clear();
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
