// The one table of launches: a column for each device, a row for each type of plain arguments.
#pragma once
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "../plan/batch_norm.h"
#include "../plan/conv.h"
#include "../plan/dropout.h"
#include "device_backend.h"

namespace braze {

// Takes the random numbers of one dropout from a generator, or from the device's default one.
struct DrawArgs {
  const std::optional<at::Generator>& generator;
  RandomState& state;
};

// Raises if it cannot be done. `like` is a tensor of the device, whose index is -1 for the CPU.
template <class Args>
using Launch = void (*)(int device, const at::Tensor& like, const Args& args);

// What fills a column: each row is a specialisation, in launch_cpu.cpp or <op>_cpu.cpp, and in
// <op>_cuda.cpp.
template <class Args>
void launch_on_cpu(int device, const at::Tensor& like, const Args& args);
template <class Args>
void launch_on_cuda(int device, const at::Tensor& like, const Args& args);

template <class... Args>
struct LaunchRows {
  std::tuple<Launch<Args>...> rows;
  static LaunchRows on_cpu() { return {{launch_on_cpu<Args>...}}; }
  static LaunchRows on_cuda() { return {{launch_on_cuda<Args>...}}; }
};

struct Launches : LaunchRows<StatisticsArgs, CombineArgs, ApplyArgs, RunningApplyArgs, BackwardArgs,
                             ReduceArgs, CoefficientsArgs, ApplyGradArgs, ConvForwardArgs,
                             ConvInputGradArgs, ConvWeightGradArgs, DrawArgs, DropoutArgs> {};

const Launches& cpu_launches();

// Runs the kernels of the device that `like` is on.
template <class Args>
void launch(const at::Tensor& like, const Args& args) {
  const DevicePlace place = device_place(like);
  const Launches& launches = place.backend == nullptr ? cpu_launches() : place.backend->launches();
  std::get<Launch<Args>>(launches.rows)(place.index, like, args);
}

}  // namespace braze
