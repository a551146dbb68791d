// The steps of plan/batch_norm.h on a device other than the CPU. `like` is a tensor of the device
// and tells which; each call is one launch on the current stream. Raises if it cannot be launched.
#pragma once
#include <ATen/core/Tensor.h>

#include "../plan/batch_norm.h"

namespace braze {

class BatchNormDevice {
 public:
  virtual ~BatchNormDevice() = default;
  virtual void statistics(const at::Tensor& like, const StatisticsArgs& args) const = 0;
  virtual void combine(const at::Tensor& like, const CombineArgs& args) const = 0;
  virtual void from_running(const at::Tensor& like, const FromRunningArgs& args) const = 0;
  virtual void apply(const at::Tensor& like, const ApplyArgs& args) const = 0;
  virtual void reduce(const at::Tensor& like, const BackwardArgs& args) const = 0;
  virtual void coefficients(const at::Tensor& like, const CoefficientsArgs& args) const = 0;
  virtual void apply_grad(const at::Tensor& like, const BackwardArgs& args) const = 0;
};

}  // namespace braze
