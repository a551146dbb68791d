// Stands in for torch's header of this name in the emulated extension.
#pragma once
#include <c10/core/Allocator.h>

namespace c10::cuda::CUDACachingAllocator {

Allocator* get();

}  // namespace c10::cuda::CUDACachingAllocator
