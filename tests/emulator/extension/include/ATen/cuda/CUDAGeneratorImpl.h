// Stands in for torch's header of this name in the emulated extension: the generator of every
// emulated device is the CPU's. While a graph is captured its numbers are behind pointers, which
// before_replay() gives new values.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <optional>

#include "../../c10/cuda/CUDAStream.h"

namespace at {

struct PhiloxCudaState {
  union Payload {
    uint64_t val;
    int64_t* ptr;
  };
  Payload seed_{}, offset_{};
  uint64_t offset_intragraph_ = 0;
  bool captured_ = false;
};

class CUDAGeneratorImpl {
 public:
  explicit CUDAGeneratorImpl(CPUGeneratorImpl* source) : mutex_(source->mutex_), source_(source) {}
  PhiloxCudaState philox_cuda_state(uint64_t increment);

  std::mutex& mutex_;

 private:
  CPUGeneratorImpl* source_;
};

namespace cuda::detail {
inline const Generator& getDefaultCUDAGenerator(c10::DeviceIndex) {
  return at::detail::getDefaultCPUGenerator();
}
}  // namespace cuda::detail

// The real one checks the type of device too.
template <>
inline CUDAGeneratorImpl* get_generator_or_default<CUDAGeneratorImpl>(
    const std::optional<Generator>& given, const Generator& otherwise) {
  thread_local std::optional<CUDAGeneratorImpl> wrapper;
  wrapper.emplace(get_generator_or_default<CPUGeneratorImpl>(given, otherwise));
  return &*wrapper;
}

}  // namespace at
