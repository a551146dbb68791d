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

__global__ void votes(unsigned* out, const int* flags) {
  const unsigned lane = threadIdx.x % 32;
  unsigned* mine = out + threadIdx.x * 8;
  mine[0] = __ballot_sync(kFull, lane % 3 == 0);
  mine[1] = static_cast<unsigned>(__any_sync(kFull, lane == 7));
  mine[2] = static_cast<unsigned>(__all_sync(kFull, lane == 7));
  mine[3] = __match_any_sync(kFull, lane % 4);
  mine[4] = static_cast<unsigned>(__reduce_add_sync(kFull, static_cast<int>(lane) - 31));
  mine[5] = __reduce_max_sync(kFull, lane);
  // Halves of a warp, apart.
  mine[6] = lane < 16 ? __reduce_add_sync(0x0000ffffu, lane) : __reduce_or_sync(0xffff0000u, lane);
  mine[7] = static_cast<unsigned>(__syncthreads_count(flags[threadIdx.x])) +
            100u * static_cast<unsigned>(__syncthreads_and(flags[threadIdx.x])) +
            1000u * static_cast<unsigned>(__syncthreads_or(flags[threadIdx.x]));
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
  std::vector<unsigned> votes_out(96 * 8);
  std::vector<int> flags(96, 1);
  flags[9] = 0;
  BRAZE_LAUNCH(votes, 1, 96, 0, nullptr, votes_out.data(), flags.data());
  for (unsigned t = 0; t < 96; ++t) {
    const unsigned* mine = &votes_out[t * 8];
    const unsigned lane = t % 32;
    CHECK(mine[0] == 0x49249249u && mine[1] == 1 && mine[2] == 0);
    CHECK(mine[3] == 0x11111111u << lane % 4);
    CHECK(static_cast<int>(mine[4]) == 31 * 16 - 31 * 32 && mine[5] == 31);
    CHECK(mine[6] == (lane < 16 ? 120 : 31));
    CHECK(mine[7] == 95 + 0 + 1000);
  }
}

// Threads that have exited are not waited for.
__global__ void early_exit(int* out) {
  if (threadIdx.x % 2) return;
  __syncthreads();
  atomicAdd(out, 1);
}

struct Totals {
  int sum, largest, smallest;
  unsigned bits, wrapped, exchanged;
  unsigned long long wide;
  float f;
  double d;
  int cas;
};
__global__ void atomics(Totals* totals) {
  const int i = static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x);
  atomicAdd(&totals->sum, i);
  atomicMax(&totals->largest, i);
  atomicMin(&totals->smallest, i - 3);
  atomicOr(&totals->bits, 1u << i % 32);
  atomicInc(&totals->wrapped, 9);
  atomicExch(&totals->exchanged, 77u);
  atomicAdd(&totals->wide, 1ull << 33);
  atomicAdd(&totals->f, 1.0f);
  atomicAdd(&totals->d, 0.5);
  int seen = atomicAdd(&totals->cas, 0);
  for (int old; (old = atomicCAS(&totals->cas, seen, seen + 2)) != seen;) seen = old;
}

void test_atomics() {
  Totals totals{};
  BRAZE_LAUNCH(atomics, 4, 100, 0, nullptr, &totals);
  CHECK(totals.sum == 399 * 200 && totals.largest == 399 && totals.smallest == -3);
  CHECK(totals.bits == kFull && totals.wrapped == 0 && totals.exchanged == 77);
  CHECK(totals.wide == 400ull << 33 && totals.f == 400 && totals.d == 200 && totals.cas == 800);
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

__global__ void grid_wide(int* a, int* b) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned n = gridDim.x * blockDim.x;
  a[i] = static_cast<int>(i);
  braze::cuda::grid_sync();
  b[i] = a[n - 1 - i];
  braze::cuda::grid_sync();
  a[i] = b[(i + 32) % n];
}

void test_blocks() {
  std::vector<float> in(512, 1.0f), partial(8);
  unsigned done = 0;
  float out = 0;
  BRAZE_LAUNCH(last_block, 8, 64, 0, nullptr, in.data(), partial.data(), &done, &out);
  CHECK(out == 512);
  std::vector<int> a(512), b(512);
  CHECK(BRAZE_LAUNCH_COOPERATIVE(grid_wide, 8, 64, 0, nullptr, a.data(), b.data()) == cudaSuccess);
  for (int i = 0; i < 512; ++i) CHECK(a[i] == 511 - (i + 32) % 512);
}

void test_intrinsics() {
  CHECK(__popc(0xf0u) == 4 && __ffs(8) == 4 && __ffs(0) == 0 && __clz(1) == 31 && __clz(0) == 32);
  CHECK(__brev(1u) == 0x80000000u && __byte_perm(0x33221100u, 0x77665544u, 0x7410u) == 0x77441100u);
  CHECK(__umulhi(0x80000000u, 6u) == 3 && __umul64hi(1ull << 63, 6) == 3);
  CHECK(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.0f);
  CHECK(__fmaf_rn(1 + 0x1p-12f, 1 - 0x1p-12f, -1.0f) == -0x1p-24f);
  CHECK(__fadd_rn(__fmul_rn(1 + 0x1p-13f, 1 - 0x1p-13f), -1.0f) == 0.0f);
  CHECK(__fsqrt_rn(2.0f) == 0x1.6a09e6p0f && __fdiv_rn(1, 3) == 0x1.555556p-2f);
  CHECK(max(1u, 2u) == 2 && min(-1, 2) == -1 && max(NAN, 1.0f) == 1.0f && min(2.0, 1.0) == 1.0);
  alignas(16) float four[8] = {1, 2, 3, 4};
  const float4 read = __ldcs(reinterpret_cast<const float4*>(four));
  __stcs(reinterpret_cast<float4*>(four + 4), read);
  CHECK(four[7] == 4 && __ldg(four + 1) == 2 && __ldg(&table[2]) == 3);
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
