// StepPlan: one optimizer's steps, from Python's objects to launches.
#pragma once
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "work.h"

namespace braze {

class StepPlan {
 public:
  StepPlan(const std::string& rule, std::string owner);
  ~StepPlan();

  // One optimizer step over everything that has a gradient. Returns "" when done, "none" when there
  // was nothing to do; otherwise nothing changed and the word says why torch's own code must do
  // this step: "mode", "sparse", "subclass", "dtype", "differentiable", "meta", or the device of
  // a parameter that has no kernel here. "overflow": found_inf is set, nothing changed. "deferred":
  // done, but whether found_inf made the step do nothing, only the device knows.
  std::string step(PyObject* groups, PyObject* state, StepScalars scalars);

  // Adds weight * gradient to each parameter's accumulator (or, with into_state, to the state that
  // the rule can sum in, where that is fp32 or fp64) and releases .grad. Returns as step() does.
  std::string fold(PyObject* groups, PyObject* state, double weight, bool into_state);

  // Of the last step that measured gradients, 0-d and one-element tensors of fp32: their norm
  // before clipping, and 1 if one was not finite.
  const at::Tensor& norm() const { return norm_; }
  const at::Tensor& found_inf() const { return found_inf_; }
  struct Statistics {
    PyObject* parameter;  // borrowed
    int64_t numel;
    double scale;  // makes the sums those of unscaled gradients, by their root
    GradientSums sums;
  };
  // Of the last step with statistics. Waits.
  std::vector<Statistics> statistics();

  void reset();
  int64_t rebuilds() const { return parameters_.builds; }
  int traverse(visitproc visit, void* arg) const { return parameters_.traverse(visit, arg); }

 private:
  class Guard;  // one call at a time
  void refresh(PyObject* groups, PyObject* state);
  void forget();
  void share_out();
  bool resolve_loss_scale(StepScalars& scalars, bool window) const;
  void measure(StepScalars& scalars, DeviceScale& scale);
  std::string carry_out(PyObject* state, StepScalars& scalars);
  void create_states(PyObject* state, const Destination& destination);
  void check_capture() const;
  template <class Body>
  void undo_states_on_failure(PyObject* state, Body body);

  std::mutex mutex_;
  std::thread::id holder_;
  // In the order of a call: what is there, where it is, which gradients there are, which state is
  // missing, and who does the work.
  Parameters parameters_;
  WrittenMemory written_;
  Gradients gradients_;
  States states_;
  std::vector<DeviceWork> work_;  // [Parameters::devices]
  Destination last_;              // of the last step
  at::Tensor norm_, found_inf_, host_norm_, host_found_inf_, all_squares_;
  double norm_scale_ = 1;
  bool scaled_on_device_ = false;
  bool has_statistics_ = false;  // of the last call
};

}  // namespace braze
