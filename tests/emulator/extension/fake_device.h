// CUDA tensors for a torch that has no CUDA: their memory is the host's, what torch computes with
// them is computed by its CPU kernels, and what a GPU could not read is an error as it is there.
#pragma once
#include <ATen/core/Generator.h>
#include <c10/core/Storage.h>

namespace fake_device {

// From now on the device type "cuda" of this process is the fake one.
void install();
bool installed();

// What the memory holds stays, as far as there is room.
void resize_storage(const c10::Storage& storage, size_t bytes);

// The CPU's generator behind a generator of the fake device; one of the CPU is an error.
at::Generator host_generator(const at::Generator& generator);
const at::Generator& default_generator(int device);

}  // namespace fake_device
