// The part of CUDA's runtime API that launchers use.
#pragma once
#include "language.h"

// Name, CUDA's number, what cudaGetErrorString says.
#define EMULATOR_ERRORS(E)                                                                      \
  E(cudaSuccess, 0, "no error")                                                                 \
  E(cudaErrorInvalidValue, 1, "invalid argument")                                               \
  E(cudaErrorMemoryAllocation, 2, "out of memory")                                              \
  E(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                         \
  E(cudaErrorInvalidSymbol, 13, "invalid device symbol")                                        \
  E(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")                   \
  E(cudaErrorInvalidDeviceFunction, 98, "invalid device function")                              \
  E(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                               \
  E(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                      \
  E(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution")         \
  E(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                             \
  E(cudaErrorIllegalState, 401, "the operation cannot be performed in the present state")       \
  E(cudaErrorNotReady, 600, "device not ready")                                                 \
  E(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                  \
  E(cudaErrorCooperativeLaunchTooLarge, 720, "too many blocks in cooperative launch")           \
  E(cudaErrorNotSupported, 801, "operation not supported")                                      \
  E(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing") \
  E(cudaErrorStreamCaptureInvalidated, 901,                                                     \
    "operation failed due to a previous error during capture")                                  \
  E(cudaErrorStreamCaptureUnmatched, 903, "capture was not initiated in this stream")           \
  E(cudaErrorStreamCaptureUnjoined, 904, "capturing stream has unjoined work")                  \
  E(cudaErrorStreamCaptureIsolation, 905,                                                       \
    "dependency created on uncaptured work in another stream")                                  \
  E(cudaErrorStreamCaptureImplicit, 906,                                                        \
    "operation would make the legacy stream depend on a capturing blocking stream")             \
  E(cudaErrorCapturedEvent, 907,                                                                \
    "operation not permitted on an event last recorded in a capturing stream")                  \
  E(cudaErrorStreamCaptureWrongThread, 908,                                                     \
    "attempt to terminate a thread-local capture sequence from another thread")                 \
  E(cudaErrorUnknown, 999, "unknown error")

#define EMULATOR_ENUMERATOR(name, value, text) name = value,
enum cudaError { EMULATOR_ERRORS(EMULATOR_ENUMERATOR) };
#undef EMULATOR_ENUMERATOR
typedef cudaError cudaError_t;

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
typedef struct CUgraph_st* cudaGraph_t;
typedef struct CUgraphExec_st* cudaGraphExec_t;
#define cudaStreamLegacy (reinterpret_cast<cudaStream_t>(1))

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2
};

inline constexpr unsigned cudaStreamDefault = 0;
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDefault = 0;
inline constexpr unsigned cudaEventBlockingSync = 1;
inline constexpr unsigned cudaEventDisableTiming = 2;
inline constexpr unsigned cudaHostAllocDefault = 0;
inline constexpr unsigned cudaHostAllocPortable = 1;
inline constexpr unsigned cudaHostAllocMapped = 2;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);

cudaError_t cudaMalloc(void** address, size_t bytes);
template <class T>
cudaError_t cudaMalloc(T** address, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(address), bytes);
}
cudaError_t cudaFree(void* address);
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned flags);
template <class T>
cudaError_t cudaHostAlloc(T** address, size_t bytes, unsigned flags) {
  return cudaHostAlloc(reinterpret_cast<void**>(address), bytes, flags);
}
template <class T>
cudaError_t cudaMallocHost(T** address, size_t bytes) {
  return cudaHostAlloc(reinterpret_cast<void**>(address), bytes, cudaHostAllocDefault);
}
cudaError_t cudaFreeHost(void* address);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void* to, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr);

cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id = nullptr);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
// Of the calling thread; gives back the mode it had.
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);

cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventDestroy(cudaEvent_t event);

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

namespace emulator {
cudaError_t set_function_attribute(void (*function)(), cudaFuncAttribute attribute, int value);
cudaError_t occupancy(int* blocks, void (*function)(), int block_threads, size_t shared_bytes);
cudaError_t host_function(cudaStream_t stream, void (*function)(void*), void* data);
}  // namespace emulator

typedef void (*cudaHostFn_t)(void*);
inline cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return emulator::host_function(stream, function, data);
}
