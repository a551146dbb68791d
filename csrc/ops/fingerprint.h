// A number that changes when one of several tensors does.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace braze {

// Of each tensor: which object it is, where its memory is, its version counter, and, on the CPU,
// what is in its memory, for what is written past the counter (tensor.data). As fast as memory is
// read.
int64_t fingerprint(const std::vector<std::optional<at::Tensor>>& tensors);

}  // namespace braze
