// Starts a rule's kernels: a source for each, so that none takes long to compile.
#pragma once
#include <algorithm>

#include "optimizer_kernels.cuh"
#include "optimizer_launch.h"

namespace braze::cuda {

// Blocks of the kernel that the device runs at once.
template <class Kernel>
cudaError_t StepLauncher::resident_blocks(Kernel kernel, int64_t& blocks) {
  const void* key = reinterpret_cast<const void*>(kernel);
  for (const auto& [known, count] : resident_blocks_) {
    blocks = count;
    if (known == key) return cudaSuccess;
  }
  int device = 0, multiprocessors = 0, blocks_each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, kBlockThreads, 0);
  }
  if (error != cudaSuccess) return error;
  blocks = static_cast<int64_t>(multiprocessors) * std::max(blocks_each, 1);
  resident_blocks_.emplace_back(key, blocks);
  return cudaSuccess;
}

template <class Rule, bool kOnDevice>
cudaError_t StepLauncher::run(size_t used, int64_t chunks, cudaStream_t stream) {
  const auto start = [&]<class Argument>(void (*kernel)(Argument)) {
    int64_t blocks = BRAZE_HOOK(chunks, chunks);
    if constexpr (kOnDevice) {  // what a block has made of hypers serves for its next chunks too
      int64_t resident = 0;
      if (const cudaError_t error = resident_blocks(kernel, resident); error != cudaSuccess) {
        return error;
      }
      blocks = std::min(blocks, resident);
    }
    return BRAZE_LAUNCH(kernel, static_cast<unsigned int>(blocks), kBlockThreads, 0, stream,
                        reinterpret_cast<const Argument&>(argument_));
  };
  constexpr bool kAverages = Rule::kIsOptimizer;
  const bool plain = plain_ && BRAZE_HOOK(no_statistics, argument_.scale.sums == nullptr);
  if constexpr (kOnDevice) {
    if (!plain) return start(device_step_kernel<Rule, false, kAverages>);
    if (averages_ == 0) return start(device_step_kernel<Rule, true, false>);
    if constexpr (kAverages) return start(device_step_kernel<Rule, true, true>);
  } else {
    if (!plain || !Rule::kUpdatesParam) return start(step_kernel<Rule, false, kAverages>);
    if constexpr (Rule::kUpdatesParam) {
      const bool small = BRAZE_HOOK(fits_small, used <= sizeof(SmallStepArgument::bytes));
      if (averages_ == 0) {
        return small ? start(small_step_kernel<Rule>) : start(step_kernel<Rule, true, false>);
      }
      if constexpr (kAverages) return start(step_kernel<Rule, true, true>);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace braze::cuda
