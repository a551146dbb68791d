// The language and the device functions, against what CUDA documents.
#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"
#include "cuda/device.cuh"

// nvcc sets its size at the launch.
__shared__ int raw_dynamic[64];
static __global__ void raw_dynamic_shared(int* out) {
  extern __shared__ int raw_dynamic[];
  raw_dynamic[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = raw_dynamic[63 - threadIdx.x];
}

namespace {

constexpr unsigned kFull = 0xffffffffu;

static_assert(sizeof(uint4) == 16 && alignof(uint4) == 16 && alignof(float4) == 16);
static_assert(sizeof(float3) == 12 && alignof(float3) == 4 && alignof(float2) == 8);
static_assert(alignof(double2) == 16 && alignof(ushort4) == 8 && alignof(uchar4) == 4);
struct __align__(32) Aligned {
  float x;
};
static_assert(alignof(Aligned) == 32);
static_assert(sizeof(dim3) == 12 && dim3(7).y == 1);

__constant__ float table[4] = {1, 2, 3, 4};

template <class T>
__global__ void __launch_bounds__(256) indices(T* out) {
  const dim3 size = blockDim;
  const unsigned thread = threadIdx.x + size.x * (threadIdx.y + size.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * size.x * size.y * size.z + thread] += thread + 1000 * block;
}

void test_indices() {
  std::vector<int> out(24 * 30, 0);
  CHECK(BRAZE_LAUNCH(indices<int>, dim3(2, 3, 5), dim3(4, 3, 2), 0, nullptr, out.data()) ==
        cudaSuccess);
  for (int i = 0; i < 24 * 30; ++i) CHECK(out[i] == i % 24 + 1000 * (i / 24));
}

struct Large {
  int values[4000];
};
__global__ void large_argument(BRAZE_GRID_CONSTANT(Large) large, const Large** seen, int* out) {
  seen[threadIdx.x] = &large;
  out[threadIdx.x] = large.values[threadIdx.x];
}

void test_large_argument() {
  Large large;
  std::iota(large.values, large.values + 4000, 0);
  std::vector<const Large*> seen(64);
  std::vector<int> out(64);
  BRAZE_LAUNCH(large_argument, 1, 64, 0, nullptr, large, seen.data(), out.data());
  for (int i = 0; i < 64; ++i) CHECK(out[i] == i && seen[i] == seen[0] && seen[i] != &large);
}

__global__ void shared_memory(float* sums, int* poison) {
  BRAZE_SHARED(float, part, 64);
  BRAZE_SHARED(float, other, 64);
  BRAZE_DYNAMIC_SHARED(double, dynamic);
  const unsigned t = threadIdx.x;
  if (t == 0) poison[blockIdx.x] = part[5] != part[5] && dynamic[63] != dynamic[63];
  __syncthreads();
  part[t] = static_cast<float>(t);
  other[t] = 2;
  dynamic[t] = blockIdx.x;
  __syncthreads();
  if (t == 0) {
    float sum = 0;
    for (int i = 0; i < 64; ++i) sum += part[i] * other[i] + static_cast<float>(dynamic[i]);
    sums[blockIdx.x] = sum;
  }
}

__global__ void plain_shared(int* out) {
  __shared__ int part[32];
  part[threadIdx.x] = static_cast<int>(threadIdx.x) * 3;
  __syncthreads();
  out[threadIdx.x] = part[31 - threadIdx.x];
}

template <class T>
__device__ T block_total(T value) {
  BRAZE_SHARED(T, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  atomicAdd(total, value);
  __syncthreads();
  return total[0];
}
__global__ void two_instances(double* out) {
  // One call site, two storages.
  const float a = block_total(1.0f);
  const double b = block_total(0.5);
  out[threadIdx.x] = a + b;
}

void test_shared() {
  std::vector<float> sums(4);
  std::vector<int> poison(4), out(64);
  BRAZE_LAUNCH(shared_memory, 4, 64, 64 * sizeof(double), nullptr, sums.data(), poison.data());
  for (int b = 0; b < 4; ++b) CHECK(sums[b] == 2 * 63 * 32 + 64 * b && poison[b]);
  BRAZE_LAUNCH(plain_shared, 1, 32, 0, nullptr, out.data());
  for (int i = 0; i < 32; ++i) CHECK(out[i] == (31 - i) * 3);
  BRAZE_LAUNCH(raw_dynamic_shared, 1, 64, 256, nullptr, out.data());
  for (int i = 0; i < 64; ++i) CHECK(out[i] == 63 - i);
  std::vector<double> totals(64);
  BRAZE_LAUNCH(two_instances, 1, 64, 0, nullptr, totals.data());
  for (const double total : totals) CHECK(total == 96);
}

__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int* mine = out + threadIdx.x * 8;
  mine[0] = __shfl_sync(kFull, lane, 5);
  mine[1] = __shfl_sync(kFull, lane, 1, 8);
  mine[2] = __shfl_up_sync(kFull, lane, 3);
  mine[3] = __shfl_down_sync(kFull, lane, 3, 16);
  mine[4] = __shfl_xor_sync(kFull, lane, 16);
  mine[5] = static_cast<int>(__shfl_sync(kFull, 1e300 * lane, 2) / 1e300);
  mine[6] = static_cast<int>(__shfl_xor_sync(kFull, int64_t{1} << 40 | lane, 1) & 63);
  // Lane 31 does not take part: what is read from it is poison.
  mine[7] = lane < 31 ? __shfl_sync(0x7fffffffu, lane, 31) : 0;
}

__global__ void votes(unsigned* out) {
  out[threadIdx.x] = __ballot_sync(kFull, threadIdx.x % 32 % 3 == 0);
}

void test_warp() {
  std::vector<int> out(96 * 8);
  BRAZE_LAUNCH(shuffles, 1, 96, 0, nullptr, out.data());
  for (int t = 0; t < 96; ++t) {
    const int* mine = &out[static_cast<size_t>(t) * 8];
    const int lane = t % 32;
    CHECK(mine[0] == 5 && mine[1] == lane / 8 * 8 + 1);
    CHECK(mine[2] == (lane < 3 ? lane : lane - 3));
    CHECK(mine[3] == (lane % 16 + 3 > 15 ? lane : lane + 3));
    CHECK(mine[4] == (lane ^ 16) && mine[5] == 2 && mine[6] == (lane ^ 1));
    CHECK(mine[7] == (lane < 31 ? -1 : 0));
  }
  std::vector<unsigned> votes_out(96);
  BRAZE_LAUNCH(votes, 1, 96, 0, nullptr, votes_out.data());
  for (const unsigned vote : votes_out) CHECK(vote == 0x49249249u);
}

// Threads that have exited are not waited for.
__global__ void early_exit(int* out) {
  if (threadIdx.x % 2) return;
  __syncthreads();
  atomicAdd(out, 1);
}

struct Totals {
  int sum;
  unsigned bits;
  float f;
  double d;
};
__global__ void atomics(Totals* totals) {
  atomicAdd(&totals->sum, static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x));
  atomicAdd(&totals->bits, 0x80000001u);
  atomicAdd(&totals->f, 1.0f);
  atomicAdd(&totals->d, 0.5);
}

void test_atomics() {
  Totals totals{};
  BRAZE_LAUNCH(atomics, 4, 100, 0, nullptr, &totals);
  CHECK(totals.sum == 399 * 200 && totals.bits == 400 && totals.f == 400 && totals.d == 200);
  int count = 0;
  BRAZE_LAUNCH(early_exit, 1, 64, 0, nullptr, &count);
  CHECK(count == 32);
}

__global__ void last_block(const float* in, float* partial, unsigned* done, float* out) {
  BRAZE_SHARED(bool, last, 1);
  const float total = block_total(in[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total;
    __threadfence();
    last[0] = atomicAdd(done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last[0]) return;
  const float all = block_total(threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0.0f);
  if (threadIdx.x == 0) *out = all;
}

void test_blocks() {
  std::vector<float> in(512, 1.0f), partial(8);
  unsigned done = 0;
  float out = 0;
  BRAZE_LAUNCH(last_block, 8, 64, 0, nullptr, in.data(), partial.data(), &done, &out);
  CHECK(out == 512);
}

void test_intrinsics() {
  CHECK(__popc(0xf0u) == 4 && max(1u, 2u) == 2 && min(-1, 2) == -1);
  CHECK(max(NAN, 1.0f) == 1.0f && min(2.0, 1.0) == 1.0);
  alignas(16) float four[8] = {1, 2, 3, 4};
  const float4 read = __ldcs(reinterpret_cast<const float4*>(four));
  __stcs(reinterpret_cast<float4*>(four + 4), read);
  CHECK(four[7] == 4 && table[2] == 3);
  braze::cuda::store16(four, braze::cuda::load16(four + 4));
  CHECK(four[0] == 1 && warpSize == 32);
}

}  // namespace

int main() {
  test_indices();
  test_large_argument();
  test_shared();
  test_warp();
  test_atomics();
  test_blocks();
  test_intrinsics();
  return finish();
}
