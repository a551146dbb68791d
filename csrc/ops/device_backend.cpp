#include "device_backend.h"

namespace braze {
namespace {

std::vector<const DeviceBackend*>& registry() {
  static std::vector<const DeviceBackend*> list;
  return list;
}

}  // namespace

void register_backend(const DeviceBackend* backend) {
  for (const DeviceBackend* known : registry()) {
    if (known == backend) return;
  }
  registry().push_back(backend);
}

const std::vector<const DeviceBackend*>& backends() { return registry(); }

DevicePlace device_place(const at::Tensor& tensor) {
  for (const DeviceBackend* backend : registry()) {
    const int index = backend->device_of(tensor);
    if (index >= 0) return {backend, index};
  }
  return {};
}

bool is_device_scalar(const at::Tensor& tensor, bool wanted) {
  for (const DeviceBackend* backend : registry()) {
    if (backend->holds_scalar(tensor, wanted)) return true;
  }
  return false;
}

}  // namespace braze
