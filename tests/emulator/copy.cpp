// Copies and fills. From pageable host memory CUDA copies before the call returns, to it after the
// copy is done; pinned memory must stay as it is until then.
#include "stream.h"

using namespace emulator;

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t handle) {
  std::lock_guard lock(api_mutex());
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) {
    return result(cudaErrorInvalidMemcpyDirection);
  }
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (bytes == 0) return cudaSuccess;
  if (to == nullptr || from == nullptr) return result(cudaErrorInvalidValue);
  const bool capturing = stream->capture != nullptr;
  const bool pageable_source =
      kind == cudaMemcpyHostToDevice && memory_kind(from) == MemoryKind::unknown;
  if (pageable_source && settings().deferred && !capturing) {
    const auto* source = static_cast<const char*>(from);
    auto staged = std::make_shared<std::vector<char>>(source, source + bytes);
    return result(submit(stream, [=] { memcpy(to, staged->data(), bytes); }));
  }
  const cudaError_t error = submit(stream, [=] { memmove(to, from, bytes); });
  const bool pageable_target =
      kind == cudaMemcpyDeviceToHost && memory_kind(to) == MemoryKind::unknown;
  if (error == cudaSuccess && pageable_target && !capturing) run_until(stream->tail);
  return result(error);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  std::lock_guard lock(api_mutex());
  if (forbidden_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  if (const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr)) return error;
  return kind == cudaMemcpyDeviceToDevice ? cudaSuccess : cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t handle) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (bytes == 0) return cudaSuccess;
  if (to == nullptr) return result(cudaErrorInvalidValue);
  return result(submit(stream, [=] { memset(to, value, bytes); }));
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}
