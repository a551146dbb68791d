// Stands in for torch's header of this name in the emulated extension.
#pragma once
#include <cuda_runtime.h>

#include "CUDAStream.h"

namespace c10::cuda {

inline DeviceIndex ExchangeDevice(DeviceIndex device) {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device);
  return static_cast<DeviceIndex>(before);
}

inline DeviceIndex MaybeExchangeDevice(DeviceIndex device) { return ExchangeDevice(device); }

}  // namespace c10::cuda
