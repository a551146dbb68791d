// What a device other than the CPU offers: the optimizers' steps and the tensor operations.
// braze._cuda provides one and hands it over when it is loaded, so that this extension never links
// CUDA.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "../plan/gradient_sums.h"
#include "../plan/tensor_work.h"

namespace braze {

// What decides a step and is in device memory: tensors of the launch's device, or null.
struct DeviceScale {
  const at::Tensor* grad_scale = nullptr;  // fp32, one element: gradients are divided by it
  const at::Tensor* found_inf = nullptr;   // fp32, one element; not 0: the step does nothing
  // Sums of squares as measure() leaves them, one for each device that the optimizer is on: fp64.
  const at::Tensor* squares = nullptr;
  double norm_scale = 1;       // the norm is sqrt(all squares) * norm_scale / grad_scale
  double max_norm = -1;        // >= 0: gradients are clipped to it
  bool skip_overflow = false;  // squares that are not finite: the step does nothing
  bool statistics = false;     // the launch adds to the sums of the last measure()
};

// What one pass over the gradients of a device found, in its memory. The tensors are the same in
// every call.
struct Measured {
  at::Tensor squares;    // fp64, one element: the sum of all
  at::Tensor norm;       // fp32, no dimension
  at::Tensor found_inf;  // fp32, one element: 1 if that sum is not finite, else 0
};

// One optimizer's steps on one device: each call is one launch on the current stream. Raises if it
// cannot be launched.
class DeviceStep {
 public:
  struct Work {
    const std::vector<TensorWork>& tensors;
    int64_t generation;  // another number whenever more than grad, hyper and first has changed
  };
  virtual ~DeviceStep() = default;
  // `scale` is for hypers that are made on the device.
  virtual void launch(const Work& work, const Hypers& hypers, const DeviceScale& scale) = 0;
  // Reads the gradients of a launch that follows, in one launch. Those that are present are
  // multiplied by `weight`, and accumulators added. Of `scale` it takes grad_scale, norm_scale and
  // statistics: whether all of the sums are wanted, or squares alone.
  virtual Measured measure(const Work& work, const Hypers& hypers, double weight,
                           const DeviceScale& scale) = 0;
  // [tensor] of the last measure() and the launch after it, which are waited for.
  virtual std::vector<GradientSums> sums() = 0;
};

struct Launches;  // launch.h

class DeviceBackend {
 public:
  static constexpr const char* kCapsuleName = "braze.DeviceBackend.5";

  virtual ~DeviceBackend() = default;
  virtual const char* name() const = 0;
  // Index of the device that holds the tensor, or -1 if it is none of this backend's.
  virtual int device_of(const at::Tensor& tensor) const = 0;
  // Whether kernels can read this one-element tensor, a step count or an option of a group.
  // `wanted`: the group asks for it (capturable or fused).
  virtual bool holds_scalar(const at::Tensor& tensor, bool wanted) const = 0;
  // torch's own, which graphs' pools and streams rely on.
  virtual c10::Allocator* allocator() const = 0;
  virtual bool is_capturing(int device) const = 0;
  virtual std::unique_ptr<DeviceStep> make_step(int device, const std::string& owner) const = 0;
  // The device's column of the launch table.
  virtual const Launches& launches() const = 0;
};

// Backends live as long as the process.
void register_backend(const DeviceBackend* backend);
const std::vector<const DeviceBackend*>& backends();

// The backend and device index of a tensor, or {nullptr, -1}.
struct DevicePlace {
  const DeviceBackend* backend = nullptr;
  int index = -1;
};
DevicePlace device_place(const at::Tensor& tensor);

// Whether some backend's kernels can read the tensor.
bool is_device_scalar(const at::Tensor& tensor, bool wanted);

}  // namespace braze
