#define BRAZE_NO_INTERCEPT
#undef cudaMalloc
#undef cudaHostAlloc
#undef cudaMemcpyAsync
#undef cudaMemsetAsync
#undef cudaEventCreateWithFlags
#undef cudaEventRecord
#undef cudaEventQuery
#undef cudaEventSynchronize
#undef cudaStreamWaitEvent
#undef cudaStreamIsCapturing
#undef cudaGetDevice
#undef cudaDeviceGetAttribute
#undef launch_kernel
#undef occupancy

#include "intercept.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

namespace intercept {
namespace {

int calls_left = -1;
bool happened = false;
const char* failing = "";
bool hold = false;
// No hash sets: MSan does not see the parts of them that are in the C++ library.
std::vector<cudaEvent_t> held;
int allocations = 0, waits = 0;
unsigned grid = 0;
std::vector<void (*)()> asked;

bool fails(const char* name) {
  if (calls_left < 0 || calls_left-- > 0) return false;
  happened = true;
  failing = name;
  return true;
}

}  // namespace

void fail_call(int k) {
  calls_left = k;
  happened = false;
}
bool failure_happened() { return happened; }
const char* failed_call() { return failing; }
void hold_events(bool value) {
  hold = value;
  held.clear();
}
int host_allocations() { return allocations; }
int event_waits() { return waits; }
unsigned last_grid() { return grid; }
int occupancies() { return static_cast<int>(asked.size()); }

}  // namespace intercept

using namespace intercept;

#define FAIL_AS(error) \
  if (fails(__func__ + sizeof("intercepted_") - 1)) return error

cudaError_t intercepted_cudaMalloc(void** address, size_t bytes) {
  FAIL_AS(cudaErrorMemoryAllocation);
  return cudaMalloc(address, bytes);
}
cudaError_t intercepted_cudaHostAlloc(void** address, size_t bytes, unsigned flags) {
  FAIL_AS(cudaErrorMemoryAllocation);
  ++allocations;
  return cudaHostAlloc(address, bytes, flags);
}
cudaError_t intercepted_cudaMemcpyAsync(void* to, const void* from, size_t bytes,
                                        cudaMemcpyKind kind, cudaStream_t stream) {
  if (fails("cudaMemcpyAsync")) {
    (void)cudaMemsetAsync(to, 0xee, bytes, stream);
    return cudaErrorUnknown;
  }
  return cudaMemcpyAsync(to, from, bytes, kind, stream);
}
cudaError_t intercepted_cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  FAIL_AS(cudaErrorUnknown);
  return cudaMemsetAsync(to, value, bytes, stream);
}
cudaError_t intercepted_cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  FAIL_AS(cudaErrorMemoryAllocation);
  return cudaEventCreateWithFlags(event, flags);
}
cudaError_t intercepted_cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  FAIL_AS(cudaErrorUnknown);
  if (hold) held.push_back(event);
  return cudaEventRecord(event, stream);
}
cudaError_t intercepted_cudaEventQuery(cudaEvent_t event) {
  FAIL_AS(cudaErrorUnknown);
  return std::count(held.begin(), held.end(), event) != 0 ? cudaErrorNotReady
                                                          : cudaEventQuery(event);
}
cudaError_t intercepted_cudaEventSynchronize(cudaEvent_t event) {
  FAIL_AS(cudaErrorUnknown);
  std::erase(held, event);
  return cudaEventSynchronize(event);
}
cudaError_t intercepted_cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event,
                                            unsigned flags) {
  FAIL_AS(cudaErrorUnknown);
  ++waits;
  return cudaStreamWaitEvent(stream, event, flags);
}
cudaError_t intercepted_cudaStreamIsCapturing(cudaStream_t stream,
                                              cudaStreamCaptureStatus* status) {
  FAIL_AS(cudaErrorUnknown);
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t intercepted_cudaGetDevice(int* device) {
  FAIL_AS(cudaErrorUnknown);
  return cudaGetDevice(device);
}
cudaError_t intercepted_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  FAIL_AS(cudaErrorUnknown);
  const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
  // A GPU so small that its blocks take several chunks each.
  if (error == cudaSuccess && attribute == cudaDevAttrMultiProcessorCount && device == 1) {
    *value = 1;
  }
  return error;
}

namespace emulator {
cudaError_t intercepted_launch_kernel(const LaunchConfig& config, const KernelCall& call) {
  FAIL_AS(cudaErrorLaunchFailure);
  grid = config.grid.x;
  return launch_kernel(config, call);
}
cudaError_t intercepted_occupancy(int* blocks, void (*function)(), int block_threads,
                                  size_t shared_bytes) {
  FAIL_AS(cudaErrorUnknown);
  if (std::count(asked.begin(), asked.end(), function) == 0) asked.push_back(function);
  return occupancy(blocks, function, block_threads, shared_bytes);
}
}  // namespace emulator
