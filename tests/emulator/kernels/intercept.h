// Compiled into every source under test (-include): its CUDA calls pass through intercept.cpp,
// which can make the k-th fail, hold events back, and give device 1 few multiprocessors.
#pragma once
#if !defined(BRAZE_NO_INTERCEPT)
#define cudaMalloc intercepted_cudaMalloc
#define cudaHostAlloc intercepted_cudaHostAlloc
#define cudaMemcpyAsync intercepted_cudaMemcpyAsync
#define cudaMemsetAsync intercepted_cudaMemsetAsync
#define cudaEventCreateWithFlags intercepted_cudaEventCreateWithFlags
#define cudaEventRecord intercepted_cudaEventRecord
#define cudaEventQuery intercepted_cudaEventQuery
#define cudaEventSynchronize intercepted_cudaEventSynchronize
#define cudaStreamWaitEvent intercepted_cudaStreamWaitEvent
#define cudaStreamIsCapturing intercepted_cudaStreamIsCapturing
#define cudaGetDevice intercepted_cudaGetDevice
#define cudaDeviceGetAttribute intercepted_cudaDeviceGetAttribute
#define launch_kernel intercepted_launch_kernel
#define occupancy intercepted_occupancy
#endif

namespace intercept {

// The k-th call from now on fails (from 0) and does nothing, except that a
// failed copy leaves rubbish; negative: none. Whether it did.
void fail_call(int k);
bool failure_happened();
const char* failed_call();

// Events recorded from now on stay incomplete for queries until waited for.
void hold_events(bool hold);

// Calls of cudaHostAlloc, cudaStreamWaitEvent.
int host_allocations();
int event_waits();
// Different kernels whose occupancy was asked for.
int occupancies();
// Blocks of the latest launch.
unsigned last_grid();

}  // namespace intercept
