// Stands in for torch's header of this name in the emulated extension: the generator of every
// emulated device is the CPU's, but fake devices have their own. While a graph is captured its
// numbers are behind pointers, which before_replay() gives new values.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <optional>

#include "../../c10/cuda/CUDAStream.h"
#include "fake_device.h"

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
  uint64_t random64() { return source_->random64(); }

  std::mutex& mutex_;

 private:
  CPUGeneratorImpl* source_;
};

namespace cuda::detail {
inline const Generator& getDefaultCUDAGenerator(c10::DeviceIndex device) {
  return fake_device::installed() ? fake_device::default_generator(device)
                                  : at::detail::getDefaultCPUGenerator();
}
}  // namespace cuda::detail

// The real one checks the type of device too.
template <>
inline CUDAGeneratorImpl* get_generator_or_default<CUDAGeneratorImpl>(
    const std::optional<Generator>& given, const Generator& otherwise) {
  thread_local std::optional<CUDAGeneratorImpl> wrapper;
  const Generator& chosen = given.has_value() && given->defined() ? *given : otherwise;
  wrapper.emplace(check_generator<CPUGeneratorImpl>(
      fake_device::installed() ? fake_device::host_generator(chosen) : chosen));
  return &*wrapper;
}

}  // namespace at
