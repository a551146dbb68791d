// The runtime's model: devices, errors, memory, streams, events, graphs.
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/device.cuh"

namespace {

__global__ void add(int* to, int value) { *to += value; }
__global__ void set(int* to, int value) { *to = value; }
__global__ void copy(const int* from, int* to) { *to = *from; }

void test_devices() {
  emulator::reset();
  int count = 0, device = -1, value = 0;
  CHECK(cudaGetDeviceCount(&count) == cudaSuccess && count == 2);
  CHECK(cudaSetDevice(1) == cudaSuccess && cudaGetDevice(&device) == cudaSuccess && device == 1);
  std::thread([&] {
    cudaGetDevice(&device);
    CHECK(device == 0);
  }).join();
  CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice);
  CHECK(cudaPeekAtLastError() == cudaErrorInvalidDevice);
  CHECK(cudaGetLastError() == cudaErrorInvalidDevice && cudaGetLastError() == cudaSuccess);
  CHECK(std::string(cudaGetErrorName(cudaErrorInvalidDevice)) == "cudaErrorInvalidDevice");
  CHECK(std::string(cudaGetErrorString(cudaErrorInvalidDevice)) == "invalid device ordinal");
  cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0);
  CHECK(value == 132);
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, add, 256, 0) == cudaSuccess);
  CHECK(value == 4);
  emulator::set_blocks_per_processor(2);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, add, 256, 0);
  CHECK(value == 2);
  emulator::set_device_count(0);
  CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 0);
  emulator::reset();
  CHECK(cudaGetLastError() == cudaSuccess);
}

void test_stream_device() {
  emulator::reset();
  cudaStream_t stream = nullptr;
  cudaEvent_t event = nullptr;
  int value = 0;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  CHECK(BRAZE_LAUNCH(add, 1, 1, 0, stream, &value, 1) == cudaSuccess);
  cudaSetDevice(1);
  CHECK(BRAZE_LAUNCH(add, 1, 1, 0, stream, &value, 1) == cudaErrorInvalidResourceHandle);
  CHECK(BRAZE_LAUNCH(add, 1, 1, 0, nullptr, &value, 1) == cudaSuccess);
  CHECK(cudaEventRecord(event, nullptr) == cudaErrorInvalidResourceHandle);
  CHECK(cudaEventRecord(event, stream) == cudaSuccess);
  cudaSetDevice(0);
  CHECK(value == 2 && emulator::launch_count(0) == 1 && emulator::launch_count(1) == 1);
  CHECK(cudaStreamDestroy(stream) == cudaSuccess);
  CHECK(cudaStreamSynchronize(stream) == cudaErrorInvalidResourceHandle);
  CHECK(cudaEventDestroy(event) == cudaSuccess);
  CHECK(cudaEventQuery(event) == cudaErrorInvalidResourceHandle);
  cudaGetLastError();
  emulator::set_null_launch(true);
  CHECK(BRAZE_LAUNCH(add, 1, 1, 0, nullptr, &value, 1) == cudaSuccess && value == 2);
  CHECK(BRAZE_LAUNCH(add, 0, 1, 0, nullptr, &value, 1) == cudaErrorInvalidConfiguration);
  CHECK(emulator::launch_count(0) == 2);
}

void test_memory() {
  emulator::reset();
  float* device = nullptr;
  int* pinned = nullptr;
  CHECK(cudaMalloc(&device, 40) == cudaSuccess && device[9] != device[9]);
  CHECK(cudaMallocHost(&pinned, 40) == cudaSuccess && pinned != nullptr);
  float values[10] = {1, 2, 3};
  CHECK(cudaMemcpy(device, values, 40, cudaMemcpyHostToDevice) == cudaSuccess && device[2] == 3);
  CHECK(cudaMemsetAsync(device, 0, 40) == cudaSuccess && device[2] == 0);
  CHECK(cudaMemcpyAsync(nullptr, values, 4, cudaMemcpyDefault) == cudaErrorInvalidValue);
  CHECK(cudaFree(pinned) == cudaErrorInvalidValue && cudaFreeHost(pinned) == cudaSuccess);
  CHECK(cudaFree(device) == cudaSuccess && cudaFree(device) == cudaErrorInvalidValue);
  CHECK(cudaFree(nullptr) == cudaSuccess);
  cudaGetLastError();
}

struct Pair {
  cudaStream_t a, b;
  cudaEvent_t event;
  Pair() {
    cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  }
  ~Pair() {
    cudaStreamDestroy(a);
    cudaStreamDestroy(b);
    cudaEventDestroy(event);
  }
};

void test_deferred() {
  emulator::reset();
  Pair p;
  int x = 0, y = 0;
  emulator::set_deferred(true);
  BRAZE_LAUNCH(set, 1, 1, 0, p.a, &x, 5);
  CHECK(x == 0 && emulator::pending_work() == 1 && cudaStreamQuery(p.b) == cudaSuccess);
  cudaStreamSynchronize(p.a);
  CHECK(x == 5 && emulator::pending_work() == 0);

  // An event orders two streams.
  for (int round = 0; round < 20; ++round) {
    x = y = 0;
    BRAZE_LAUNCH(set, 1, 1, 0, p.a, &x, 7);
    cudaEventRecord(p.event, p.a);
    cudaStreamWaitEvent(p.b, p.event);
    BRAZE_LAUNCH(copy, 1, 1, 0, p.b, &x, &y);
    cudaStreamSynchronize(p.b);
    CHECK(y == 7);
  }
  // The event has what was recorded, not what came later.
  x = 0;
  cudaEventRecord(p.event, p.a);
  BRAZE_LAUNCH(set, 1, 1, 0, p.a, &x, 1);
  emulator::set_schedule({emulator::Order::inorder, 0, 0});
  CHECK(cudaEventSynchronize(p.event) == cudaSuccess && x == 0);
  cudaDeviceSynchronize();
  CHECK(x == 1);

  // A loop of queries ends.
  BRAZE_LAUNCH(add, 1, 1, 0, p.a, &x, 1);
  cudaEventRecord(p.event, p.a);
  int queries = 0;
  while (cudaEventQuery(p.event) == cudaErrorNotReady) ++queries;
  CHECK(queries > 0 && queries < 5 && x == 2 && cudaGetLastError() == cudaErrorNotReady);

  // The null stream waits for blocking streams, and they for it.
  cudaStream_t blocking = nullptr;
  cudaStreamCreateWithFlags(&blocking, cudaStreamDefault);
  x = y = 0;
  BRAZE_LAUNCH(set, 1, 1, 0, blocking, &x, 3);
  BRAZE_LAUNCH(copy, 1, 1, 0, nullptr, &x, &y);
  BRAZE_LAUNCH(add, 1, 1, 0, blocking, &x, y);
  cudaStreamSynchronize(blocking);
  CHECK(y == 3 && x == 3);
  cudaDeviceSynchronize();
  cudaStreamDestroy(blocking);

  // Pageable memory is staged, pinned memory is read when the copy runs.
  int pageable = 1, *pinned = nullptr, *device = nullptr;
  cudaMallocHost(&pinned, 4);
  cudaMalloc(&device, 8);
  *pinned = 1;
  cudaMemcpyAsync(device, &pageable, 4, cudaMemcpyHostToDevice, p.a);
  cudaMemcpyAsync(device + 1, pinned, 4, cudaMemcpyHostToDevice, p.a);
  pageable = *pinned = 2;
  int back[2] = {};
  cudaMemcpyAsync(back, device, 8, cudaMemcpyDeviceToHost, p.a);
  CHECK(back[0] == 1 && back[1] == 2);
  cudaFree(device);
  cudaFreeHost(pinned);
  emulator::set_deferred(false);
}

void test_graph() {
  emulator::reset();
  Pair p;
  int x = 0, y = 0, argument = 5;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaStreamCaptureStatus status;
  CHECK(cudaStreamBeginCapture(p.a, cudaStreamCaptureModeGlobal) == cudaSuccess);
  CHECK(cudaStreamIsCapturing(p.a, &status) == cudaSuccess &&
        status == cudaStreamCaptureStatusActive);
  CHECK(BRAZE_LAUNCH(add, 1, 1, 0, p.a, &x, argument) == cudaSuccess);
  argument = 100;
  cudaEventRecord(p.event, p.a);
  cudaStreamWaitEvent(p.b, p.event);
  cudaMemcpyAsync(&y, &x, 4, cudaMemcpyDeviceToDevice, p.b);
  cudaEventRecord(p.event, p.b);
  cudaStreamWaitEvent(p.a, p.event);
  CHECK(cudaStreamEndCapture(p.a, &graph) == cudaSuccess && graph != nullptr);
  CHECK(x == 0 && y == 0 && emulator::launch_count(0) == 0);
  CHECK(cudaGraphInstantiate(&exec, graph) == cudaSuccess);
  CHECK(cudaGraphDestroy(graph) == cudaSuccess);
  for (int i = 1; i <= 3; ++i) {
    CHECK(cudaGraphLaunch(exec, p.a) == cudaSuccess && x == 5 * i && y == 5 * i);
  }
  CHECK(emulator::launch_count(0) == 3);
  cudaGraphExecDestroy(exec);
}

void test_capture_errors() {
  emulator::reset();
  Pair p;
  int x = 0;
  cudaGraph_t graph = nullptr;
  cudaStream_t blocking = nullptr;
  cudaStreamCreateWithFlags(&blocking, cudaStreamDefault);
  cudaEvent_t outside = nullptr;
  cudaEventCreate(&outside);
  void* memory = nullptr;
  const auto spoilt = [&](cudaStream_t stream, const std::function<cudaError_t()>& call) {
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
    const cudaError_t error = call();
    CHECK(BRAZE_LAUNCH(set, 1, 1, 0, stream, &x, 1) != cudaSuccess);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
    CHECK(graph == nullptr && x == 0);
    cudaGetLastError();
    return error;
  };
  const cudaError_t unsupported = cudaErrorStreamCaptureUnsupported;
  CHECK(spoilt(p.a, [&] { return cudaMalloc(&memory, 4); }) == unsupported);
  CHECK(spoilt(p.a, [&] { return cudaStreamSynchronize(p.a); }) == unsupported);
  CHECK(spoilt(p.a, [&] { return cudaStreamSynchronize(p.b); }) == unsupported);
  CHECK(spoilt(p.a, [&] { return cudaDeviceSynchronize(); }) == unsupported);
  CHECK(spoilt(p.a, [&] { return cudaEventQuery(outside); }) == unsupported);
  CHECK(spoilt(p.a, [&] { return cudaMemcpy(&x, &x, 4, cudaMemcpyDefault); }) == unsupported);
  CHECK(spoilt(blocking, [&] { return BRAZE_LAUNCH(set, 1, 1, 0, nullptr, &x, 1); }) ==
        cudaErrorStreamCaptureImplicit);
  CHECK(spoilt(p.a, [&] {
          cudaEventRecord(p.event, p.a);
          return cudaEventQuery(p.event);
        }) == cudaErrorCapturedEvent);
  CHECK(spoilt(p.a, [&] {
          cudaEventRecord(outside, p.b);
          return cudaStreamWaitEvent(p.a, outside);
        }) == cudaErrorStreamCaptureIsolation);

  cudaStreamBeginCapture(p.a, cudaStreamCaptureModeGlobal);
  cudaEventRecord(p.event, p.a);
  cudaStreamWaitEvent(p.b, p.event);
  BRAZE_LAUNCH(set, 1, 1, 0, p.b, &x, 1);
  CHECK(cudaStreamEndCapture(p.b, &graph) == cudaErrorStreamCaptureUnmatched);
  CHECK(cudaStreamEndCapture(p.a, &graph) == cudaErrorStreamCaptureUnjoined);
  CHECK(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal) == unsupported);

  // A relaxed capture allows them, and another thread's thread-local one does not concern us.
  cudaStreamBeginCapture(p.a, cudaStreamCaptureModeRelaxed);
  CHECK(cudaMalloc(&memory, 4) == cudaSuccess && cudaFree(memory) == cudaSuccess);
  CHECK(cudaStreamEndCapture(p.a, &graph) == cudaSuccess);
  cudaGraphDestroy(graph);
  cudaStreamBeginCapture(p.a, cudaStreamCaptureModeThreadLocal);
  std::thread([&] { CHECK(cudaDeviceSynchronize() == cudaSuccess); }).join();
  CHECK(cudaStreamEndCapture(p.a, &graph) == cudaSuccess);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(blocking);
  cudaEventDestroy(outside);
  cudaGetLastError();
}

__global__ void count_threads(int* out) {
  BRAZE_SHARED(int, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  atomicAdd(total, 1);
  __syncthreads();
  if (threadIdx.x == 0) *out += total[0];
}

void test_host_threads() {
  emulator::reset();
  int out = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 50; ++k) BRAZE_LAUNCH(count_threads, 1, 64, 0, nullptr, &out);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(out == 4 * 50 * 64 && emulator::launch_count(0) == 200);
}

}  // namespace

int main() {
  test_devices();
  test_stream_device();
  test_memory();
  test_deferred();
  test_graph();
  test_capture_errors();
  test_host_threads();
  return finish();
}
