// What CUDA forbids is an error that says where; schedules can be replayed; barriers can be
// deleted.
#include <algorithm>
#include <set>
#include <vector>

#include "check.h"
#include "cuda/device.cuh"

namespace {

constexpr unsigned kFull = 0xffffffffu;

// test_errors names the lines of these.
__global__ void divergent_barrier() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void same_barrier() { __syncthreads(); }
__global__ void half_with_full_mask() {
  if (threadIdx.x < 16) __shfl_sync(kFull, 1, 0);
  __syncthreads();
}
__global__ void caller_not_in_mask() { __syncwarp(1u); }
__global__ void exited_lane() {
  if (threadIdx.x == 31) return;
  __ballot_sync(kFull, 1);
}
__global__ void partial_warp() { __syncwarp(); }
__global__ void divergent_shuffle() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __ballot_sync(kFull, 1);
  }
}
__global__ void unequal_masks() { __syncwarp(threadIdx.x < 16 ? kFull : 0xffff0000u); }
__global__ void bad_width() { __shfl_sync(kFull, 1, 0, 12); }
__global__ void lonely_grid_sync() { braze::cuda::grid_sync(); }
__global__ void trapped() { __trap(); }
__global__ void much_shared(char* out) {
  BRAZE_SHARED(char, all, 50000);
  out[0] = all[0];
}

void test_errors() {
  const auto launch = [](void (*kernel)(), int threads) {
    return error_of([=] { BRAZE_LAUNCH((kernel), 2, threads, 0, nullptr); });
  };
  const std::string barrier = launch(divergent_barrier, 32);
  CHECK(has(barrier, "barrier divergence") && has(barrier, "rules.cu:17") &&
        has(barrier, "rules.cu:19"));
  CHECK(has(barrier, "kernel (kernel)") && has(barrier, "BRAZE_EMULATOR_SEED="));
  CHECK(launch(same_barrier, 32).empty());
  const std::string deadlock = launch(half_with_full_mask, 32);
  CHECK(has(deadlock, "deadlock") && has(deadlock, "rules.cu:24") && has(deadlock, "rules.cu:25"));
  CHECK(has(deadlock, "(and 15 more there)"));
  CHECK(has(launch(caller_not_in_mask, 32), "does not name the caller's own lane"));
  CHECK(has(launch(exited_lane, 32), "exited"));
  CHECK(has(launch(partial_warp, 48), "partial warp"));
  CHECK(has(launch(divergent_shuffle, 32), "warp divergence"));
  // Which rule is broken first depends on who runs first.
  const std::string unequal = launch(unequal_masks, 32);
  CHECK(has(unequal, "warp divergence") || has(unequal, "has exited"));
  CHECK(has(launch(bad_width, 32), "width is 12"));
  CHECK(has(launch(lonely_grid_sync, 32), "BRAZE_LAUNCH_COOPERATIVE"));
  CHECK(has(launch(trapped, 32), "__trap"));
  char out;
  CHECK(has(error_of([&] { BRAZE_LAUNCH(much_shared, 1, 1, 0, nullptr, &out); }), "49,152"));
  CHECK(has(error_of([] { __syncthreads(); }), "outside a kernel"));
  // The emulator works on after an error.
  CHECK(launch(same_barrier, 1024).empty());
}

__global__ void throws() {
  if (threadIdx.x == 3) throw 7;
  __syncthreads();
}
void test_foreign_exception() {
  int caught = 0;
  try {
    BRAZE_LAUNCH(throws, 1, 64, 0, nullptr);
  } catch (int value) {
    caught = value;
  }
  CHECK(caught == 7);
}

__global__ void mark(int* ran) { ++*ran; }

void test_configurations() {
  int ran = 0;
  const auto launch = [&](dim3 grid, dim3 block, size_t shared) {
    return BRAZE_LAUNCH(mark, grid, block, shared, nullptr, &ran);
  };
  CHECK(launch(1, 1025, 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(1, dim3(1, 1, 65), 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(1, dim3(32, 33, 1), 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(1, dim3(0, 1, 1), 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(0, 1, 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(dim3(1, 0, 1), 1, 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(dim3(1, 65536, 1), 1, 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(dim3(1, 1, 65536), 1, 0) == cudaErrorInvalidConfiguration);
  CHECK(launch(1, 1, 48 * 1024 + 1) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(mark, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024 + 1) ==
        cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess);
  CHECK(ran == 0);
  CHECK(cudaFuncSetAttribute(mark, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024) ==
        cudaSuccess);
  CHECK(launch(1, 1, 227 * 1024) == cudaSuccess && launch(dim3(1, 65535, 1), 1, 0) == cudaSuccess);
  CHECK(ran == 65536);
  // An earlier failure nobody asked about is what the next launch returns, as with CUDA.
  cudaSetDevice(99);
  CHECK(launch(1, 1, 0) == cudaErrorInvalidDevice && launch(1, 1, 0) == cudaSuccess);
  CHECK(BRAZE_LAUNCH_COOPERATIVE(mark, 264, 1, 0, nullptr, &ran) == cudaSuccess);
  CHECK(BRAZE_LAUNCH_COOPERATIVE(mark, 265, 1, 0, nullptr, &ran) ==
        cudaErrorCooperativeLaunchTooLarge);
  emulator::set_cooperative_blocks(300);
  CHECK(BRAZE_LAUNCH_COOPERATIVE(mark, 265, 1, 0, nullptr, &ran) == cudaSuccess);
}

__global__ void trace(std::vector<int>* order) {
  const int id = static_cast<int>(blockIdx.x * 1000 + threadIdx.x);
  order->push_back(id);
  __syncthreads();
  order->push_back(id);
}

std::vector<int> traced(emulator::Order order, uint64_t seed) {
  emulator::reset();
  emulator::set_schedule({order, seed, 0});
  std::vector<int> result;
  BRAZE_LAUNCH(trace, 5, 96, 0, nullptr, &result);
  return result;
}

void test_orders() {
  using emulator::Order;
  std::vector<int> up, down;
  for (int b = 0; b < 5; ++b) {
    for (int twice = 0; twice < 2; ++twice) {
      for (int t = 0; t < 96; ++t) up.push_back(b * 1000 + t);
    }
  }
  down.assign(up.rbegin(), up.rend());
  CHECK(traced(Order::inorder, 0) == up);
  CHECK(traced(Order::reverse, 0) == down);
  for (const Order order : {Order::random, Order::pct}) {
    std::set<std::vector<int>> different;
    for (uint64_t seed = 0; seed < 20; ++seed) {
      std::vector<int> once = traced(order, seed);
      CHECK(once == traced(order, seed));
      different.insert(once);
      std::sort(once.begin(), once.end());
      std::vector<int> all = up;
      std::sort(all.begin(), all.end());
      CHECK(once == all);
    }
    CHECK(different.size() == 20);
  }
}

__global__ void handshake(int* value) {
  // A thread that waits for another in a loop: ends only if atomics are places to switch.
  if (threadIdx.x == 0) {
    while (atomicAdd(value, 0) == 0) {
    }
  } else if (threadIdx.x == 63) {
    atomicExch(value, 1);
  }
}

__global__ void exchange(int* out) {
  BRAZE_SHARED(int, cell, 64);
  cell[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = cell[63 - threadIdx.x];
  __syncwarp();
}

__global__ void deep(int* out) {
  volatile char frame[300000];
  frame[0] = 1;
  frame[299999] = 2;
  *out = frame[0] + frame[299999];
}

void test_controls() {
  emulator::reset();
  emulator::Schedule schedule = emulator::schedule();
  schedule.preemption = 0.5;
  emulator::set_schedule(schedule);
  int value = 0;
  BRAZE_LAUNCH(handshake, 1, 64, 0, nullptr, &value);
  CHECK(value == 1);

  emulator::reset();
  std::vector<int> out(64);
  const auto right = [&] {
    BRAZE_LAUNCH(exchange, 1, 64, 0, nullptr, out.data());
    for (int i = 0; i < 64; ++i) {
      if (out[static_cast<size_t>(i)] != 63 - i) return false;
    }
    return true;
  };
  CHECK(right());
  const auto sites = emulator::barrier_sites();
  CHECK(sites.size() == 2 && sites[0].kind == "__syncthreads" && sites[1].kind == "__syncwarp");
  CHECK(has(sites[0].file, "rules.cu") && sites[0].line + 2 == sites[1].line);
  emulator::drop_barrier("0");
  CHECK(!right() && emulator::dropped_arrivals() == 64);
  emulator::drop_barrier("rules.cu:" + std::to_string(sites[1].line));
  CHECK(right() && emulator::dropped_arrivals() == 64);
  emulator::drop_barrier("");
  CHECK(right() && emulator::dropped_arrivals() == 0);

  std::vector<int> ran(1000);
  emulator::set_block_range(7, 9);
  BRAZE_LAUNCH(trace, 1000, 1, 0, nullptr, &ran);
  CHECK(ran.size() == 1004 && ran[1000] / 1000 + ran[1002] / 1000 == 15);
  emulator::clear_block_range();

  emulator::set_stack_bytes(2 << 20);
  int sum = 0;
  BRAZE_LAUNCH(deep, 1, 2, 0, nullptr, &sum);
  CHECK(sum == 3);
  emulator::set_stack_bytes(64 << 10);

  // A thread that never waits costs no switch.
  const uint64_t before = emulator::switch_count();
  BRAZE_LAUNCH(mark, 100, 1000, 0, nullptr, &sum);
  CHECK(emulator::switch_count() - before <= 200 && sum == 100003);
}

}  // namespace

int main() {
  test_errors();
  test_foreign_exception();
  test_configurations();
  test_controls();
  test_orders();
  return finish();
}
