// Errors, devices, memory, and the checks of a launch.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <unordered_map>

#include "stream.h"

namespace emulator {
namespace {

struct Allocation {
  size_t bytes;
  MemoryKind kind;
};

struct Devices {
  std::map<const char*, Allocation> memory;
  std::unordered_map<void (*)(), int> dynamic_shared;  // the opt-in above 48 KB
  std::map<int, int64_t> launches;
  uint64_t launch_number = 0;
};

Devices& devices() {
  static Devices* const instance = new Devices;
  return *instance;
}

thread_local int device_now = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t allocate(void** address, size_t bytes, MemoryKind kind) {
  if (address == nullptr) return cudaErrorInvalidValue;
  give(address, nullptr);
  if (bytes == 0) return cudaSuccess;
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) return cudaErrorMemoryAllocation;
  give(address, memory);
  // A huge allocation stays sparse.
  constexpr size_t kMaxFilled = size_t{64} << 20;
  if (bytes <= kMaxFilled) fill_poison(*address, bytes);
  devices().memory[static_cast<const char*>(*address)] = {bytes, kind};
  return cudaSuccess;
}

cudaError_t deallocate(void* address, MemoryKind kind) {
  if (address == nullptr) return cudaSuccess;
  const auto found = devices().memory.find(static_cast<const char*>(address));
  if (found == devices().memory.end() || found->second.kind != kind) return cudaErrorInvalidValue;
  // As CUDA's: waits for everything.
  run_everything();
  devices().memory.erase(found);
  free(address);
  return cudaSuccess;
}

cudaError_t check(const LaunchConfig& config, const KernelCall& call, const CUstream_st* stream) {
  if (stream == nullptr || stream->device != current_device()) {
    return cudaErrorInvalidResourceHandle;
  }
  const dim3 &grid = config.grid, &block = config.block;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto opted = devices().dynamic_shared.find(call.function);
  const size_t limit = opted == devices().dynamic_shared.end()
                           ? kDefaultSharedBytes
                           : std::max(kDefaultSharedBytes, static_cast<size_t>(opted->second));
  if (config.shared_bytes > limit) return cudaErrorInvalidValue;
  if (config.cooperative && static_cast<uint64_t>(grid.x) * grid.y * grid.z >
                                static_cast<uint64_t>(settings().cooperative_blocks)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

// A launch that runs later owns its arguments.
struct StoredLaunch {
  LaunchConfig config;
  KernelCall call;
  StoredLaunch(const LaunchConfig& given, const KernelCall& kernel) : config(given), call(kernel) {
    void* copy = nullptr;
    const size_t alignment = std::max(kernel.alignment, sizeof(void*));
    if (posix_memalign(&copy, alignment, kernel.bytes) != 0) fail("no memory for a queued launch");
    memcpy(copy, kernel.arguments, kernel.bytes);
    call.arguments = copy;
  }
  StoredLaunch(const StoredLaunch&) = delete;
  ~StoredLaunch() { free(const_cast<void*>(call.arguments)); }
};

void run(const LaunchConfig& config, const KernelCall& call) {
  const uint64_t number = devices().launch_number++;
  if (!settings().null_launch) run_launch(config, call, number);
}

}  // namespace

int current_device() { return device_now; }

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

void count_launch(int device) { ++devices().launches[device]; }

int64_t launch_count(int device) {
  std::lock_guard lock(api_mutex());
  return devices().launches[device];
}

void reset_launch_count() {
  std::lock_guard lock(api_mutex());
  devices().launches.clear();
}

void reset_devices() {
  devices().launches.clear();
  devices().dynamic_shared.clear();
  devices().launch_number = 0;
  device_now = 0;
  last_error = cudaSuccess;
}

MemoryKind memory_kind(const void* address) {
  const auto* byte = static_cast<const char*>(address);
  auto after = devices().memory.upper_bound(byte);
  if (after == devices().memory.begin()) return MemoryKind::unknown;
  --after;
  return byte < after->first + after->second.bytes ? after->second.kind : MemoryKind::unknown;
}

cudaError_t launch_kernel(const LaunchConfig& config, const KernelCall& call) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(config.stream);
  cudaError_t error = check(config, call, stream);
  if (error == cudaSuccess) {
    if (stream->capture || settings().deferred) {
      auto stored = std::make_shared<StoredLaunch>(config, call);
      error = submit(stream, [stored] { run(stored->config, stored->call); }, stream->device);
    } else {
      const auto now = [&] { run(config, call); };
      error = submit(stream, std::ref(now), stream->device);
    }
  }
  result(error);
  return cudaGetLastError();
}

cudaError_t set_function_attribute(void (*function)(), cudaFuncAttribute attribute, int value) {
  std::lock_guard lock(api_mutex());
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > kMaxSharedBytes) {
    return result(cudaErrorInvalidValue);
  }
  devices().dynamic_shared[function] = value;
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, void (*)(), int block_threads, size_t shared_bytes) {
  if (blocks == nullptr || block_threads <= 0) return result(cudaErrorInvalidValue);
  const bool fits = block_threads <= 1024 && shared_bytes <= kMaxSharedBytes;
  give(blocks, fits ? settings().blocks_per_processor : 0);
  return cudaSuccess;
}

}  // namespace emulator

using namespace emulator;

const char* cudaGetErrorName(cudaError_t error) {
#define EMULATOR_NAME(name, value, text) \
  if (error == name) return #name;
  EMULATOR_ERRORS(EMULATOR_NAME)
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
#define EMULATOR_TEXT(name, value, text) \
  if (error == name) return text;
  EMULATOR_ERRORS(EMULATOR_TEXT)
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDeviceCount(int* count) {
  give(count, settings().device_count);
  return result(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* device) {
  give(device, device_now);
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= settings().device_count) return result(cudaErrorInvalidDevice);
  device_now = device;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  give(version, CUDART_VERSION);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= settings().device_count) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: give(value, 1024); break;
    case cudaDevAttrMaxSharedMemoryPerBlock: give(value, kDefaultSharedBytes); break;
    case cudaDevAttrWarpSize: give(value, 32); break;
    case cudaDevAttrMultiProcessorCount: give(value, 132); break;
    case cudaDevAttrL2CacheSize: give(value, 50 << 20); break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: give(value, 2048); break;
    case cudaDevAttrComputeCapabilityMajor: give(value, 9); break;
    case cudaDevAttrComputeCapabilityMinor: give(value, 0); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: give(value, 228 * 1024); break;
    case cudaDevAttrCooperativeLaunch: give(value, 1); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: give(value, kMaxSharedBytes); break;
    default: return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, size_t bytes) {
  std::lock_guard lock(api_mutex());
  if (forbidden_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  return result(allocate(address, bytes, MemoryKind::device));
}

cudaError_t cudaFree(void* address) {
  std::lock_guard lock(api_mutex());
  if (forbidden_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  return result(deallocate(address, MemoryKind::device));
}

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  std::lock_guard lock(api_mutex());
  if (forbidden_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  return result(allocate(address, bytes, MemoryKind::pinned));
}

cudaError_t cudaFreeHost(void* address) {
  std::lock_guard lock(api_mutex());
  if (forbidden_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  return result(deallocate(address, MemoryKind::pinned));
}
