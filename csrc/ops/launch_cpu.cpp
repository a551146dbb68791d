// The CPU's column of the launch table. Threads are torch's.
#include <ATen/CPUGeneratorImpl.h>

#include <mutex>

#include "../cpu/batch_norm_cpu.h"
#include "../cpu/dropout_cpu.h"
#include "dense.h"
#include "launch.h"
#include "new_like.h"

namespace braze {
namespace {

at::Tensor workspace(const at::Tensor& like, const ActivationShape& shape) {
  const auto bytes = static_cast<int64_t>(cpu::batch_norm_workspace(shape));
  return new_array(like, {bytes}, c10::kByte);
}

}  // namespace

template <>
void launch_on_cpu(int, const at::Tensor& like, const StatisticsArgs& args) {
  cpu::statistics(args, workspace(like, args.shape).mutable_data_ptr(), allowed_threads());
}
template <>
void launch_on_cpu(int, const at::Tensor&, const CombineArgs& args) {
  cpu::combine(args);
}
template <>
void launch_on_cpu(int, const at::Tensor&, const ApplyArgs& args) {
  if (args.shape.numel() != 0) cpu::apply(args, allowed_threads());
}
template <>
void launch_on_cpu(int device, const at::Tensor& like, const RunningApplyArgs& args) {
  for (int k = 0; k < 2; ++k) {
    if (args.stats[k] != nullptr) cpu::from_running(args.from_running(k));
  }
  launch_on_cpu<ApplyArgs>(device, like, args);
}
template <>
void launch_on_cpu(int, const at::Tensor& like, const BackwardArgs& args) {
  cpu::backward(args, workspace(like, args.shape).mutable_data_ptr(), allowed_threads());
}
template <>
void launch_on_cpu(int, const at::Tensor& like, const ReduceArgs& args) {
  cpu::reduce(args, workspace(like, args.shape).mutable_data_ptr(), allowed_threads());
}
template <>
void launch_on_cpu(int, const at::Tensor&, const CoefficientsArgs& args) {
  cpu::coefficients(args);
}
template <>
void launch_on_cpu(int, const at::Tensor&, const ApplyGradArgs& args) {
  if (args.shape.numel() != 0) cpu::apply_grad(args, allowed_threads());
}

template <>
void launch_on_cpu(int, const at::Tensor&, const DrawArgs& args) {
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(
      args.generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(source->mutex_);
  args.state = {};
  args.state.seed = source->random64();
}
template <>
void launch_on_cpu(int, const at::Tensor&, const DropoutArgs& args) {
  cpu::dropout(args, allowed_threads());
}

const Launches& cpu_launches() {
  static const Launches column{Launches::on_cpu()};
  return column;
}

}  // namespace braze
