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

#include "../cpu/optimizer_cpu.h"
#include "../plan/chunks.h"
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
  const char* obstacle = nullptr;  // why no kernel can take this parameter, or null
  DType real = DType::f32;
  bool linear = false;     // dense, and so is all of its state, in the same order
  bool in_window = false;  // its momentum buffer already holds gradients of the open window
};

// Scalars of one call that do not come from param_groups.
struct StepScalars {
  double grad_scale = 1;       // 1 / loss scale: multiplies the gradients that are present
  double window_weight = -1;   // >= 0: an accumulation window with this sum of weights closes now
  bool mean = false;           // divide the window's sum by its weights; present gradients weigh 1
  bool need_gradient = false;  // without a present gradient, leave the window open
  double divisor = 1;          // derived
};

class StepPlan {
 public:
  StepPlan(const std::string& algorithm, std::string owner);
  ~StepPlan();

  // One optimizer step over everything that has a gradient. Returns "" when done, "none" when there
  // was nothing to do; otherwise nothing changed and the word says why torch's own code must do
  // this step: "sparse", "subclass", "dtype", "differentiable", "meta", or the device of a
  // parameter that has no kernel here.
  std::string step(PyObject* groups, PyObject* state, StepScalars scalars);

  // Adds weight * gradient to each parameter's accumulator (or, with into_momentum, to its momentum
  // buffer where that is fp32 or fp64) and releases .grad. Returns as step() does.
  std::string fold(PyObject* groups, PyObject* state, double weight, bool into_momentum);

  void reset();
  int64_t rebuilds() const { return rebuilds_; }
  int traverse(visitproc visit, void* arg) const;

 private:
  struct Active;  // one slot with work in this call
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
  struct BiasCorrection {  // of the last (betas, step) seen: groups mostly share it
    double beta1 = -1, beta2 = -1, step = -1;
    double correction1 = 0, inv_sqrt_correction2 = 0;
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
  bool folds_into_momentum(const Slot& slot, bool into_momentum) const;

  std::string collect(bool include_window);
  std::string admit_unusual(Active& active, const at::Tensor& param, const at::Tensor& grad);
  void create_state(PyObject* groups, PyObject* state, bool fold, bool into_momentum);
  void fill_work(const Destination& destination);
  void fill(TensorWork& work, const Active& active, const Destination& destination);
  int32_t adam_hyper(const Active& active, const StepScalars& scalars);
  int32_t sgd_hyper(const Active& active, const StepScalars& scalars);
  template <class Launch>
  void launch(Launch run);
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
  std::vector<Active> active_;
  std::deque<at::Tensor> held_;  // gradients that were materialised or must outlive the GIL
  std::vector<TensorWork> work_;
  std::deque<Layout> layouts_;
  ChunkList chunks_;
  std::vector<int64_t> work_key_, work_key_scratch_;  // what work_ and chunks_ were made for
  HyperKey last_key_{};
  BiasCorrection power_;
  std::vector<cpu::AdamHyper> adam_;
  std::vector<cpu::SgdHyper> sgd_;
  std::vector<cpu::FoldHyper> fold_;
};

}  // namespace braze
