// One device's share of a call, as plain work lists, and the launch that carries it out.
#pragma once
#include <deque>
#include <memory>
#include <span>

#include "../../plan/chunks.h"
#include "../tensor_work.h"
#include "states.h"

namespace braze {

// Scalars of one call that do not come from param_groups.
struct StepScalars {
  double grad_scale = 1;       // 1 / loss scale: multiplies the gradients that are present
  DeviceScale amp;             // a GradScaler's tensors, on any device; grad_scale is 1 then
  double window_weight = -1;   // >= 0: an accumulation window with this sum of weights closes now
  bool mean = false;           // divide the window's sum by its weights; present gradients weigh 1
  bool counts = false;         // the closing call weighs 1 even if it brings no gradient
  double max_norm = -1;        // >= 0: the gradients are clipped to it
  bool find_overflow = false;  // gradients that are not finite: nothing is done
  bool refuse_overflow = false;  // or raised for, before anything is done
  bool statistics = false;       // of gradients and updates
  double average_weight = -1;    // >= 0: of the new parameters in their running averages
  bool device_counts = false;    // step counts that are still to be made are for devices to keep
  double divisor = 1;            // derived
  double coefficient = 1;        // derived: that of clipping, where the CPU knows it
  bool overflowed = false;       // derived: and that nothing is to be done

  bool deferred = false;        // derived: whether gradients overflowed, only the device knows
  bool norm_on_device = false;  // derived: and the same of their norm

  bool averages() const { return average_weight >= 0; }
  bool norm_decides() const { return max_norm >= 0 || find_overflow; }
  bool measures() const { return norm_decides() || statistics; }
  // What gradients are multiplied by to be measured: those of a window join sums.
  double measured_weight() const { return window_weight >= 0 ? grad_scale : 1; }
  // Gradients as they are measured, times this, are those that the rule is to see before clipping.
  double norm_scale() const { return window_weight >= 0 ? 1 / divisor : grad_scale; }
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

class DeviceWork {
 public:
  explicit DeviceWork(DevicePlace place) : place_(place) {}

  bool on_cpu() const { return place_.backend == nullptr; }
  // There is work, and the device's stream is being captured into a graph.
  bool capturing() const {
    return !active.empty() && !on_cpu() && place_.backend->is_capturing(place_.index);
  }
  // What the formulas need, computed in double once per (group, step count); sets each active
  // slot's `counted`, `step` and `hyper`.
  void choose_hypers(const Parameters& parameters, const StepScalars& scalars, bool repeating);
  // The same for gradients that are folded into sums with a weight.
  void choose_hypers(const Parameters& parameters, const Destination& destination, double weight);
  // The work lists of `active`; those of the last call are taken over where they still hold.
  void fill(const Parameters& parameters, const Destination& destination, bool repeating);
  // One pass over the gradients of step(): on the CPU their sum of squares; on a device, on its
  // way, see Measured.
  double measure_on_cpu(const StepScalars& scalars);
  Measured measure_on_device(const Parameters& parameters, const StepScalars& scalars);
  // scale: on a device, what its memory decides beside `scalars`.
  void launch(const Parameters& parameters, const Destination& destination,
              const StepScalars& scalars, DeviceScale scale);
  // What the last step with statistics found, by slot. Waits.
  std::vector<std::pair<size_t, GradientSums>> sums();
  // After a step's launch: counts on what the CPU counts, the parameters' versions among it.
  void count_step() const;
  // The lists point to slots that are no more.
  void forget() { key_ = {}; }
  void release();

  std::span<Active> active;  // of this call
  bool launched = false;     // in this call: from here on its state counts

 private:
  // What the hyper-parameters of two parameters must have in common to be the same.
  struct HyperKey {
    int32_t group = -1;
    double step = 0;
    bool in_window = false, has_sum = false;
    bool operator==(const HyperKey&) const = default;
  };
  // What the lists of one parameter depend on beside its slot's content.
  struct TensorKey {
    size_t slot;
    uint32_t states;
    bool counted, linear, has_grad, has_sum;
    bool operator==(const TensorKey&) const = default;
  };
  struct WorkKey {
    int64_t build = -1;
    Destination destination;
    std::vector<TensorKey> tensors;
    bool operator==(const WorkKey&) const = default;
  };
  DeviceScalar scalar_for(const at::Tensor& param, const at::Tensor* tensor);
  void fill_tensor(const Parameters& parameters, TensorWork& work, const Active& a,
                   const Destination& destination);
  template <class Body>
  void without_gil(const Body& body);
  Hypers hypers(const Destination& destination, const StepScalars& scalars) const;
  DeviceStep& device_step(const Parameters& parameters);
  // The tensor, or a copy of it, on this device.
  const at::Tensor* here(const at::Tensor* tensor);

  DevicePlace place_;                 // no backend: the CPU
  std::unique_ptr<DeviceStep> step_;  // of the backend
  std::unique_ptr<HyperTable> table_;
  std::vector<Hyper<Fold>> folds_;
  bool counts_on_device_ = false;  // those of one of the parameters at least
  bool made_on_device_ = false;    // the kernel makes the formulas' arguments
  std::vector<TensorWork> tensors_;
  std::vector<GradientSums> sums_;  // [chunk], on the CPU
  std::deque<Layout> layouts_;
  ChunkList chunks_;
  WorkKey key_, new_key_;        // what tensors_ and chunks_ were made for
  int64_t generation_ = 0;       // counts how often
  std::deque<at::Tensor> held_;  // gradients that must outlive the GIL, scalars moved to the device
};

}  // namespace braze
