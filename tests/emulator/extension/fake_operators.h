// What the fake device's tensors are made of, and torch's operators on them.
#pragma once
#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>

namespace fake_device {

constexpr c10::DeviceType kType = c10::kCUDA;
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

c10::DeviceIndex current_device();

// Allocates memory and runs operators from now on.
void register_operators();

}  // namespace fake_device
