// What a GPU does with the building blocks of the kernels: one table on standard output, a JSON
// object a line. micro copy | read | launch | tickets | kernels FILE.cubin ...
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cuda/batch_norm_units.cuh"
#include "../csrc/cuda/device.cuh"

namespace {

using braze::cuda::load16;

constexpr int kThreads = 256;

struct Weak {
  static constexpr const char* kName = "weak";
  static __device__ void store(uint4* to, uint4 value) { braze::cuda::store16(to, value); }
};
struct Strong {
  static constexpr const char* kName = "strong";
  static __device__ void store(uint4* to, uint4 value) { __stwb(to, value); }
};
struct Streaming {
  static constexpr const char* kName = "streaming";
  static __device__ void store(uint4* to, uint4 value) { __stcs(to, value); }
};

// kFlight loads of 16 bytes are under way in each thread before the first is stored.
template <int kFlight, class Store>
__global__ void copy_kernel(const uint4* from, uint4* to, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + (kFlight - 1) * stride < count; i += kFlight * stride) {
    uint4 held[kFlight];
#pragma unroll
    for (int j = 0; j < kFlight; ++j) held[j] = load16(from + i + j * stride);
#pragma unroll
    for (int j = 0; j < kFlight; ++j) Store::store(to + i + j * stride, held[j]);
  }
  for (; i < count; i += stride) Store::store(to + i, load16(from + i));
}

template <int kFlight>
__global__ void read_kernel(const uint4* from, uint4* to, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  uint32_t mixed = 0;
  for (; i + (kFlight - 1) * stride < count; i += kFlight * stride) {
    uint4 held[kFlight];
#pragma unroll
    for (int j = 0; j < kFlight; ++j) held[j] = load16(from + i + j * stride);
#pragma unroll
    for (int j = 0; j < kFlight; ++j) mixed ^= held[j].x ^ held[j].y ^ held[j].z ^ held[j].w;
  }
  for (; i < count; i += stride) mixed ^= load16(from + i).x;
  // Practically never: so that the loads are needed.
  if (mixed == 0x9e3779b9u) Weak::store(to, uint4{mixed, 0, 0, 0});
}

template <int kBytes>
struct Argument {
  unsigned char bytes[kBytes];
};
template <int kBytes>
__global__ void empty_kernel(BRAZE_GRID_CONSTANT(Argument<kBytes>) argument, unsigned int* out) {
  if (argument.bytes[0] != 0 && threadIdx.x == 0) *out = argument.bytes[1];
}

__global__ void plain_kernel(unsigned int* ticket, unsigned int* out) {
  if (ticket == nullptr && threadIdx.x == 0) *out = 1;
}
__global__ void ticket_kernel(unsigned int* ticket, unsigned int* out) {
  if (braze::cuda::is_last_block(ticket, gridDim.x) && threadIdx.x == 0) *out += 1;
}

bool fine(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    std::fprintf(stderr, "%s: CUDA error: %s\n", what, cudaGetErrorString(error));
  return error == cudaSuccess;
}
#define CHECK(call) \
  if (!fine((call), #call)) return 1

double host_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of one of `count` launches that follow each other, between two events of the stream.
template <class Launch>
double seconds_each(int count, Launch launch) {
#if defined(BRAZE_EMULATOR)
  (void)count;  // no clock to repeat for
  const double began = host_seconds();
  if (!fine(launch(), "launch") || !fine(cudaDeviceSynchronize(), "synchronize")) return -1;
  return host_seconds() - began;
#else
  cudaEvent_t begin, end;
  if (!fine(cudaEventCreate(&begin), "event") || !fine(cudaEventCreate(&end), "event")) return -1;
  if (!fine(launch(), "launch")) return -1;
  if (!fine(cudaEventRecord(begin), "event")) return -1;
  for (int i = 0; i < count; ++i) {
    if (!fine(launch(), "launch")) return -1;
  }
  if (!fine(cudaEventRecord(end), "event")) return -1;
  if (!fine(cudaEventSynchronize(end), "synchronize")) return -1;
  float ms = 0;
  if (!fine(cudaEventElapsedTime(&ms, begin, end), "event")) return -1;
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return 1e-3 * ms / count;
#endif
}

struct Memory {
  uint4 *from = nullptr, *to = nullptr;
  int64_t count = 0;
  int processors = 0;

  int allocate() {
#if defined(BRAZE_EMULATOR)
    count = int64_t{1} << 14;
#else
    count = int64_t{1} << 26;  // 1 GiB each: many times L2
#endif
    const size_t bytes = static_cast<size_t>(count) * sizeof(uint4);
    CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    CHECK(cudaMalloc(&from, bytes));
    CHECK(cudaMalloc(&to, bytes));
    CHECK(cudaMemset(from, 7, bytes));
    CHECK(cudaMemset(to, 0, bytes));
    return 0;
  }
};

using MemoryKernel = void (*)(const uint4*, uint4*, int64_t);

int measure_memory(const Memory& memory, MemoryKernel kernel, const char* what, int flight,
                   int passes) {
  int resident = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0));
  for (const int blocks : {1, 2, 3, 4, 6, 8}) {
    if (blocks > resident) break;
    const dim3 grid(static_cast<unsigned>(memory.processors * blocks));
    const double seconds = seconds_each(5, [&] {
      return BRAZE_LAUNCH(kernel, grid, dim3(kThreads), 0, nullptr, memory.from, memory.to,
                          memory.count);
    });
    if (seconds < 0) return 1;
    const double bytes = static_cast<double>(passes) * static_cast<double>(memory.count) * 16;
    std::printf(
        "{\"what\": \"%s\", \"flight_bytes\": %d, \"warps\": %d, \"kb_in_flight\": %.0f, "
        "\"gb_s\": %.1f}\n",
        what, flight * 16, blocks * kThreads / 32, blocks * kThreads * flight * 16 / 1024.0,
        bytes / seconds / 1e9);
    std::fflush(stdout);
  }
  return 0;
}

template <class Store>
int copies(const Memory& memory) {
  const std::string name = std::string("copy, ") + Store::kName + " stores";
  return measure_memory(memory, copy_kernel<1, Store>, name.c_str(), 1, 2) ||
         measure_memory(memory, copy_kernel<2, Store>, name.c_str(), 2, 2) ||
         measure_memory(memory, copy_kernel<4, Store>, name.c_str(), 4, 2) ||
         measure_memory(memory, copy_kernel<8, Store>, name.c_str(), 8, 2);
}

int copy() {
  Memory memory;
  return memory.allocate() || copies<Weak>(memory) || copies<Strong>(memory) ||
         copies<Streaming>(memory);
}

int read() {
  Memory memory;
  return memory.allocate() || measure_memory(memory, read_kernel<1>, "read", 1, 1) ||
         measure_memory(memory, read_kernel<2>, "read", 2, 1) ||
         measure_memory(memory, read_kernel<4>, "read", 4, 1) ||
         measure_memory(memory, read_kernel<8>, "read", 8, 1);
}

template <int kBytes>
int measure_launch(unsigned int* out) {
  static const Argument<kBytes> argument = {};
  const auto launch = [&] {
    return BRAZE_LAUNCH(empty_kernel<kBytes>, dim3(1), dim3(32), 0, nullptr, argument, out);
  };
  CHECK(launch());
  CHECK(cudaDeviceSynchronize());
  // Fewer than a queue holds: the host never waits for the device.
  constexpr int kCalls = 200;
  const double began = host_seconds();
  for (int i = 0; i < kCalls; ++i) CHECK(launch());
  const double host = (host_seconds() - began) / kCalls;
  CHECK(cudaDeviceSynchronize());
  const double each = seconds_each(2000, launch);
  if (each < 0) return 1;
  std::printf(
      "{\"what\": \"empty launch\", \"argument_bytes\": %d, \"host_us\": %.2f, "
      "\"each_us\": %.2f}\n",
      kBytes, host * 1e6, each * 1e6);
  std::fflush(stdout);
  return 0;
}

int launch() {
  unsigned int* out = nullptr;
  CHECK(cudaMalloc(&out, sizeof *out));
  return measure_launch<64>(out) || measure_launch<4000>(out) || measure_launch<32000>(out);
}

int tickets() {
  int processors = 0;
  CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  unsigned int* memory = nullptr;
  CHECK(cudaMalloc(&memory, 256));
  CHECK(cudaMemset(memory, 0, 256));
  for (const int blocks : {processors, 2 * processors, 4 * processors}) {
    const dim3 grid(static_cast<unsigned>(blocks));
    const auto time = [&](void (*kernel)(unsigned int*, unsigned int*)) {
      return seconds_each(500, [&] {
        return BRAZE_LAUNCH(kernel, grid, dim3(kThreads), 0, nullptr, memory, memory + 32);
      });
    };
    const double plain = time(plain_kernel), ticket = time(ticket_kernel);
    if (plain < 0 || ticket < 0) return 1;
    std::printf(
        "{\"what\": \"tickets\", \"blocks\": %d, \"without_us\": %.2f, \"with_us\": %.2f}\n",
        blocks, plain * 1e6, ticket * 1e6);
    std::fflush(stdout);
  }
  return 0;
}

#if !defined(BRAZE_EMULATOR)
int describe(cudaKernel_t kernel) {
  const void* function = kernel;
  const char* name = nullptr;
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetName(&name, function));
  CHECK(cudaFuncGetAttributes(&attributes, function));
  const int threads = attributes.maxThreadsPerBlock;  // of its launch bounds
  int blocks = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, 0));
  std::printf(
      "{\"what\": \"kernel\", \"name\": \"%s\", \"registers\": %d, \"local_bytes\": %zu, "
      "\"shared_bytes\": %zu, \"threads\": %d, \"blocks_per_multiprocessor\": %d}\n",
      name, attributes.numRegs, attributes.localSizeBytes, attributes.sharedSizeBytes, threads,
      blocks);
  return 0;
}

int kernels(int count, char** files) {
  for (int i = 0; i < count; ++i) {
    cudaLibrary_t library;
    CHECK(cudaLibraryLoadFromFile(&library, files[i], nullptr, nullptr, 0, nullptr, nullptr, 0));
    unsigned int found = 0;
    CHECK(cudaLibraryGetKernelCount(&found, library));
    std::vector<cudaKernel_t> list(found);
    CHECK(cudaLibraryEnumerateKernels(list.data(), found, library));
    for (const cudaKernel_t kernel : list) {
      if (describe(kernel)) return 1;
    }
    CHECK(cudaLibraryUnload(library));
  }
  return 0;
}
#else
int kernels(int, char**) { return 0; }  // what the emulator has no registers for
#endif

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "copy") return copy();
  if (what == "read") return read();
  if (what == "launch") return launch();
  if (what == "tickets") return tickets();
  if (what == "kernels") return kernels(argc - 2, argv + 2);
  std::fprintf(stderr, "usage: micro copy | read | launch | tickets | kernels FILE.cubin ...\n");
  return 2;
}
