// One seeded bug, or its correct twin, by name: which detector reports it?
// seeded <case> [block threads]; prints "wrong" and returns 3 if the result is wrong.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/device.cuh"
#include "emulator/control.h"

namespace {

int size = 64;
bool buggy = false;

// --- races ---

template <bool kBug>
__global__ void write_read(int* out) {
  BRAZE_SHARED(int, cell, 1024);
  cell[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!kBug) __syncthreads();
  out[threadIdx.x] = cell[blockDim.x - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void loop_carried(int* out) {
  BRAZE_SHARED(int, cell, 1024);
  int sum = 0;
  for (int round = 0; round < 4; ++round) {
    cell[threadIdx.x] = round;
    __syncthreads();
    sum += cell[(threadIdx.x + 32) % blockDim.x];
    if (!kBug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool kBug>
__global__ void within_warp(int* out) {
  BRAZE_SHARED(int, cell, 1024);
  cell[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!kBug) __syncwarp();
  out[threadIdx.x] = cell[threadIdx.x ^ 31u];
}

template <bool kBug>
__global__ void blocks_share(int* out) {
  if (threadIdx.x == 0) out[kBug ? 0 : blockIdx.x] = static_cast<int>(blockIdx.x);
}

__global__ void last_block_done(int* partial, unsigned* done, int* out) {
  BRAZE_SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = 1;
    __threadfence();
    last[0] = atomicAdd(done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last[0] && threadIdx.x == 0) {
    for (unsigned b = 0; b < gridDim.x; ++b) *out += partial[b];
  }
}

// --- memory ---

template <bool kBug>
__global__ void static_index(int* out) {
  BRAZE_SHARED(int, cell, 64);
  int* const start = cell;
  start[threadIdx.x + (kBug ? 1 : 0)] = 1;
  *out = start[threadIdx.x];
}
template <bool kBug>
__global__ void dynamic_index(int* out) {
  BRAZE_DYNAMIC_SHARED(int, cell);
  cell[threadIdx.x + (kBug ? 1 : 0)] = 1;
  *out = cell[threadIdx.x];
}
__global__ void global_index(const int* in, int n, int* out) {
  if (static_cast<int>(threadIdx.x) < n) *out = in[threadIdx.x];
}
__global__ void misaligned(const char* in, uint4* out) { *out = braze::cuda::load16(in); }
__global__ void overflow(int big, int64_t* out) { *out = big * static_cast<int>(gridDim.x); }
template <bool kBug>
__global__ void unwritten_shared(int* out) {
  BRAZE_SHARED(int, cell, 64);
  if (!kBug || threadIdx.x != 5) cell[threadIdx.x] = 1;
  __syncthreads();
  if (cell[63 - threadIdx.x] > 0) atomicAdd(out, 1);
}
__global__ void count_positive(const float* in, int* out) {
  if (in[threadIdx.x] > 0) atomicAdd(out, 1);
}
__global__ void recurse(int depth, volatile int* out);

// --- order ---

__global__ void float_sum(const float* in, float* out) { atomicAdd(out, in[threadIdx.x]); }
__global__ void stage(const int* from, int* to) { *to = *from; }

bool races(const char* name, bool& right) {
  std::vector<int> out(1024, -1);
  const auto n = static_cast<unsigned>(size);
  if (!strcmp(name, "write_read")) {
    BRAZE_LAUNCH((buggy ? write_read<true> : write_read<false>), 1, size, 0, nullptr, out.data());
    for (unsigned i = 0; i < n; ++i) right &= out[i] == static_cast<int>(n - 1 - i);
  } else if (!strcmp(name, "loop_carried")) {
    BRAZE_LAUNCH((buggy ? loop_carried<true> : loop_carried<false>), 1, size, 0, nullptr,
                 out.data());
    for (unsigned i = 0; i < n; ++i) right &= out[i] == 6;
  } else if (!strcmp(name, "within_warp")) {
    BRAZE_LAUNCH((buggy ? within_warp<true> : within_warp<false>), 1, size, 0, nullptr, out.data());
    for (unsigned i = 0; i < n; ++i) right &= out[i] == static_cast<int>(i ^ 31u);
  } else if (!strcmp(name, "blocks_share")) {
    BRAZE_LAUNCH((buggy ? blocks_share<true> : blocks_share<false>), 4, size, 0, nullptr,
                 out.data());
  } else if (!strcmp(name, "last_block_done")) {
    unsigned done = 0;
    int total = 0;
    BRAZE_LAUNCH(last_block_done, 6, size, 0, nullptr, out.data(), &done, &total);
    right = total == 6;
  } else {
    return false;
  }
  return true;
}

bool memory(const char* name, bool& right) {
  int* out = nullptr;
  cudaMalloc(&out, sizeof(int));
  cudaMemset(out, 0, sizeof(int));
  if (!strcmp(name, "static_index")) {
    BRAZE_LAUNCH((buggy ? static_index<true> : static_index<false>), 1, 64, 0, nullptr, out);
  } else if (!strcmp(name, "dynamic_index")) {
    BRAZE_LAUNCH((buggy ? dynamic_index<true> : dynamic_index<false>), 1, 64, 256, nullptr, out);
  } else if (!strcmp(name, "global_index")) {
    int* in = nullptr;
    cudaMalloc(&in, 60 * sizeof(int));
    BRAZE_LAUNCH(global_index, 1, 64, 0, nullptr, in, buggy ? 61 : 60, out);
    cudaFree(in);
  } else if (!strcmp(name, "misaligned")) {
    alignas(16) char bytes[64] = {};
    uint4 vector;
    BRAZE_LAUNCH(misaligned, 1, 1, 0, nullptr, bytes + (buggy ? 8 : 16), &vector);
  } else if (!strcmp(name, "overflow")) {
    int64_t product = 0;
    BRAZE_LAUNCH(overflow, 2, 1, 0, nullptr, buggy ? 1 << 30 : 1 << 29, &product);
    right = product == 1 << 30;
  } else if (!strcmp(name, "unwritten_shared")) {
    BRAZE_LAUNCH((buggy ? unwritten_shared<true> : unwritten_shared<false>), 1, 64, 0, nullptr,
                 out);
    right = *out == 64;
  } else if (!strcmp(name, "unwritten_global")) {
    float* in = nullptr;
    cudaMalloc(&in, 64 * sizeof(float));
    cudaMemset(in, 1, (buggy ? 63 : 64) * sizeof(float));
    BRAZE_LAUNCH(count_positive, 1, 64, 0, nullptr, in, out);
    right = *out == 64;
    cudaFree(in);
  } else if (!strcmp(name, "stack")) {
    BRAZE_LAUNCH(recurse, 1, 1, 0, nullptr, buggy ? 1000000 : 10, out);
  } else {
    return false;
  }
  cudaFree(out);
  return true;
}

bool orders(const char* name, bool& right) {
  if (!strcmp(name, "float_sum")) {
    std::vector<float> in(256);
    for (size_t i = 0; i < in.size(); ++i) in[i] = buggy ? 1.0f / static_cast<float>(i + 1) : 1.0f;
    float sum = 0;
    BRAZE_LAUNCH(float_sum, 1, 256, 0, nullptr, in.data(), &sum);
    printf("%a\n", static_cast<double>(sum));
  } else if (!strcmp(name, "staging")) {
    // Two copies through one pinned buffer; the second write must wait for the first copy.
    cudaStream_t stream = nullptr;
    cudaEvent_t copied = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&copied, cudaEventDisableTiming);
    int *staging = nullptr, *target = nullptr;
    cudaMallocHost(&staging, sizeof(int));
    cudaMalloc(&target, 2 * sizeof(int));
    emulator::set_deferred(true);
    for (int i = 0; i < 2; ++i) {
      if (!buggy) cudaEventSynchronize(copied);
      *staging = i + 1;
      cudaMemcpyAsync(target + i, staging, sizeof(int), cudaMemcpyHostToDevice, stream);
      cudaEventRecord(copied, stream);
    }
    cudaStreamSynchronize(stream);
    right = target[0] == 1 && target[1] == 2;
    emulator::set_deferred(false);
  } else if (!strcmp(name, "event_wait")) {
    cudaStream_t a = nullptr, b = nullptr;
    cudaEvent_t written = nullptr;
    cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&written, cudaEventDisableTiming);
    int from = 9, middle = 0, to = 0;
    emulator::set_deferred(true);
    BRAZE_LAUNCH(stage, 1, 1, 0, a, &from, &middle);
    cudaEventRecord(written, a);
    if (!buggy) cudaStreamWaitEvent(b, written);
    BRAZE_LAUNCH(stage, 1, 1, 0, b, &middle, &to);
    cudaStreamSynchronize(b);
    right = to == 9;
    emulator::set_deferred(false);
  } else {
    return false;
  }
  return true;
}

__global__ void recurse(int depth, volatile int* out) {
  volatile char frame[256];
  frame[0] = static_cast<char>(depth);
  if (depth > 0) recurse(depth - 1, out);
  *out = *out + frame[0];
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    fprintf(stderr, "usage: seeded CASE bug|ok [THREADS]\n");
    return 2;
  }
  buggy = !strcmp(arguments[2], "bug");
  if (count > 3) size = atoi(arguments[3]);
  bool right = true;
  const char* name = arguments[1];
  try {
    if (!races(name, right) && !memory(name, right) && !orders(name, right)) {
      fprintf(stderr, "seeded: no case %s\n", name);
      return 2;
    }
  } catch (const emulator::Error&) {
    return 4;
  }
  if (!right) puts("wrong");
  return right ? 0 : 3;
}
