// Memory for results, for CPU tensors and those of a backend. Its bytes are what they are: torch's
// own empty fills them under torch.use_deterministic_algorithms(True), which kernels that write all
// of a result need not wait for.
#pragma once
#include <ATen/core/Tensor.h>

namespace braze {

// An uninitialised tensor in the order that torch's empty_like gives it.
//
// malloc gives large blocks back to the system and takes fresh ones, and the first write to a fresh
// page takes 3-7x as long as to one in use. Results above 1 MiB get the memory of earlier
// ones, of which up to 512 MiB are kept for this process.
at::Tensor new_like(const at::Tensor& like);

// The same for a tensor that stays: in fresh memory.
at::Tensor new_lasting(const at::Tensor& like, c10::ScalarType dtype);

// An uninitialised dense tensor of these sizes on the device of `like`.
at::Tensor new_array(const at::Tensor& like, at::IntArrayRef sizes, c10::ScalarType dtype,
                     c10::MemoryFormat format = c10::MemoryFormat::Contiguous);

// Off: results get fresh memory, and nothing is kept.
void set_memory_reuse(bool on);
bool memory_reuse();
// Bytes that are kept now and no tensor uses.
size_t memory_kept();
void empty_memory_cache();

}  // namespace braze
