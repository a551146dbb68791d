#include "fingerprint.h"

#include "../cpu/checksum_cpu.h"
#include "../cpu/parallel.h"
#include "dense.h"

namespace braze {

int64_t fingerprint(const std::vector<std::optional<at::Tensor>>& tensors) {
  using cpu::mix;
  uint64_t hash = 0;
  for (const auto& tensor : tensors) {
    if (!tensor || !tensor->defined()) {
      hash = mix(hash, 1);
      continue;
    }
    const c10::TensorImpl* impl = tensor->unsafeGetTensorImpl();
    hash = mix(hash, reinterpret_cast<uintptr_t>(impl));
    if (!tensor->is_inference()) hash = mix(hash, static_cast<uint64_t>(tensor->_version()));
    if (tensor->layout() != c10::kStrided || !tensor->has_storage()) continue;
    const void* data = tensor->const_data_ptr();
    hash = mix(hash, reinterpret_cast<uintptr_t>(data));
    if (tensor->is_cpu() && data != nullptr) {
      const at::Tensor dense =
          tensor->is_non_overlapping_and_dense() ? *tensor : tensor->contiguous();
      const auto size = static_cast<int64_t>(dense.nbytes());
      hash = mix(hash, cpu::checksum(dense.const_data_ptr(), size,
                                     cpu::threads_for(size / 4, size, allowed_threads())));
    }
  }
  return static_cast<int64_t>(hash);
}

}  // namespace braze
