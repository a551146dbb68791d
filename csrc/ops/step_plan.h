// StepPlan: an optimizer's parameters and state as seen from C++, built once and compared with
// Python at every step.
#pragma once
#include <ATen/core/Tensor.h>

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../plan/hyper.h"
#include "device_backend.h"
#include "python_state.h"
#include "tensor_work.h"

namespace braze {

// Sizes and strides of a tensor, as a range of the plan's dims_: [ndim] sizes, then [ndim] strides.
struct Geometry {
  int32_t offset = 0, ndim = 0;
};

// A tensor and what it looked like when the plan was built. The object is owned by the plan's
// snapshot.
struct SeenTensor {
  PyObject* object = nullptr;
  const void* data = nullptr;     // of element 0
  const void* storage = nullptr;  // start of the storage's memory
  Geometry geometry;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  c10::DispatchKeySet keys;  // a lazy conjugation shows nowhere else
};

// One parameter. Kept small: every step reads all of them.
struct Slot {
  SeenTensor param;
  SeenTensor state[kMaxStates], step, sum;
  PyObject* state_dict = nullptr;  // its inner state dict, or null; owned by the snapshot
  int64_t numel = 0;               // real elements
  int32_t group = 0, index = 0;    // param_groups[group]['params'][index]
  int32_t batch = 0;               // where it is updated: batches_[batch]
  const char* obstacle = nullptr;  // why no kernel can take this parameter, or null
  DType real = DType::f32;
  bool linear = false;     // dense, and so is all of its state, in the same order
  bool in_window = false;  // its momentum buffer already holds gradients of the open window
};

// Scalars of one call that do not come from param_groups.
struct StepScalars {
  double grad_scale = 1;      // 1 / loss scale: multiplies the gradients that are present
  DeviceScale amp;            // a GradScaler's tensors, on any device; grad_scale is 1 then
  double window_weight = -1;  // >= 0: an accumulation window with this sum of weights closes now
  bool mean = false;          // divide the window's sum by its weights; present gradients weigh 1
  bool counts = false;        // the closing call weighs 1 even if it brings no gradient
  double divisor = 1;         // derived
};

class StepPlan {
 public:
  StepPlan(const std::string& algorithm, std::string owner);
  ~StepPlan();

  // One optimizer step over everything that has a gradient. Returns "" when done, "none" when there
  // was nothing to do; otherwise nothing changed and the word says why torch's own code must do
  // this step: "mode", "sparse", "subclass", "dtype", "differentiable", "meta", or the device of
  // a parameter that has no kernel here. "overflow": found_inf is set, nothing changed. "deferred":
  // done, but whether found_inf made the step do nothing, only the device knows.
  std::string step(PyObject* groups, PyObject* state, StepScalars scalars);

  // Adds weight * gradient to each parameter's accumulator (or, with into_momentum, to its momentum
  // buffer where that is fp32 or fp64) and releases .grad. Returns as step() does.
  std::string fold(PyObject* groups, PyObject* state, double weight, bool into_momentum);

  void reset();
  int64_t rebuilds() const { return rebuilds_; }
  int traverse(visitproc visit, void* arg) const;

 private:
  struct Active;  // one slot with work in this call
  struct Batch;   // all work of one device
  class Guard;    // one call at a time
  struct Destination {
    bool fold = false;  // write accumulators (or momentum buffers) instead of parameters
    bool into_momentum = false;
  };
  struct Owner {
    const Slot* slot;
    PyObject* key;  // of the state tensor; null: the parameter itself
  };
  struct HyperKey {
    int32_t group;
    double variant;
    bool has_sum;
    bool operator==(const HyperKey&) const = default;
  };
  struct LastCorrection {  // of the last (betas, step) seen: groups mostly share it
    double beta1 = -1, beta2 = -1, step = -1;
    BiasCorrection correction{};
  };

  void refresh(PyObject* groups, PyObject* state);
  void build(PyObject* groups, PyObject* state);
  void build_slot(Slot& slot, PyObject* state);
  void see(SeenTensor& entry, PyObject* object, const Geometry* known);
  bool same_geometry(const Geometry& geometry, const at::Tensor& tensor) const;
  bool unchanged(const SeenTensor& entry) const;
  bool unchanged(const Slot& slot) const;
  void adopt_state(Slot& slot, SeenTensor& entry, PyObject* object, PyObject* key);
  void adopt_states(Slot& slot);
  void check_overlap();
  void refuse_overlapping_gradient(const Slot& slot, const at::Tensor& grad) const;
  template <class Compare>
  bool gather(Compare compare);
  void gather_slot(size_t slot);
  void prefetch(size_t slot) const;
  void drop();
  std::string name_of(const Slot& slot) const;
  std::string name_of(const Owner& owner) const;
  PyObject* state_key(int k) const;
  int max_states() const;
  int num_states(const GroupOptions& options) const;
  uint8_t shape_of(const GroupOptions& options) const;
  bool folds_into_momentum(const Slot& slot, bool into_momentum) const;

  std::string collect(bool include_window, bool may_repeat);
  std::string admit_unusual(Active& active, const at::Tensor& param, const at::Tensor& grad);
  void create_state(PyObject* groups, PyObject* state, bool fold, bool into_momentum);
  template <class Body>
  void undo_state_on_failure(PyObject* state, Body body);
  void undo_state(PyObject* state);
  int32_t batch_of(const at::Tensor& param);
  void arrange_batches();
  bool repeats();
  void settle();
  void check_gradient(const Slot& slot, const at::Tensor& grad) const;
  bool counts_on_device(const Slot& slot) const;
  void check_capture() const;
  bool resolve_loss_scale(StepScalars& scalars, bool window);
  void choose_hypers(const StepScalars& scalars);
  void fill_work(Batch& batch, const Destination& destination);
  void fill(Batch& batch, TensorWork& work, const Active& active, const Destination& destination);
  DeviceScalar device_scalar(const Batch& batch, PyObject* option);
  AdamRule adam_rule(const GroupOptions& o) const;
  SgdRule sgd_rule(const GroupOptions& o) const;
  int32_t adam_hyper(Batch& batch, const Active& active, const StepScalars& scalars);
  int32_t sgd_hyper(Batch& batch, const Active& active, const StepScalars& scalars);
  void launch_step(Batch& batch, const StepScalars& scalars);
  void launch_fold(Batch& batch);
  template <class Run>
  void run_on_cpu(Batch& batch, Run run);
  void leave_window(PyObject* groups, PyObject* state);

  Algorithm algorithm_;
  std::string owner_;  // class name, for messages
  std::mutex mutex_;
  std::thread::id holder_;
  PyObject* groups_ = nullptr;  // of the call in progress, for messages
  Snapshot snapshot_;
  std::vector<Slot> slots_;
  std::vector<int64_t> dims_;
  std::vector<Owner> owners_;                           // of the memory that steps write
  std::vector<Footprint> footprints_;                   // [owner]
  std::vector<std::pair<uintptr_t, uintptr_t>> spans_;  // the same, sorted and merged
  std::vector<at::Tensor>
      spare_sums_;  // [slot] accumulators between windows, out of Python's sight
  std::vector<GroupReader> readers_;
  std::vector<GroupOptions> options_;
  int64_t rebuilds_ = 0;

  // Scratch of one call, kept for its capacity.
  enum class Finding : uint8_t { stale, no_gradient, usual, other_order, unusual };
  struct Gathered {
    const at::Tensor* grad;
    Finding finding;
  };
  std::vector<Gathered> gathered_;  // [slot]
  // Of the last step, if it came to its end: one that finds the same again keeps active_ and
  // batches_.
  std::vector<Finding> settled_findings_;  // [slot]; empty: none
  std::vector<uint8_t> settled_groups_;    // [group]
  int64_t settled_build_ = -1;
  bool repeating_ = false;
  std::vector<Active> active_;
  std::vector<std::pair<Slot*, PyObject*>> created_;  // state entries that this call made, by key
  std::deque<at::Tensor> held_;  // gradients that were materialised or must outlive the GIL
  bool any_on_cpu_ = false;
  std::vector<Batch> batches_;  // [0]: the CPU; one more for each device met
  std::vector<int64_t> work_key_scratch_;
  HyperKey last_key_{};
  LastCorrection power_;
};

}  // namespace braze
