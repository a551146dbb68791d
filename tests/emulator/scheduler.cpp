#include "scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#if defined(BRAZE_EMULATOR_MSAN)
#include <sanitizer/msan_interface.h>
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace emulator {

Launch* launch_now = nullptr;
Block* block_now = nullptr;
Thread* thread_now = nullptr;
bool preemption_enabled = false;

namespace {

void activate(Thread* thread) {
  thread_now = thread;
  threadIdx = thread->index;
  blockIdx = block_now->index;
}

void fiber_main();

void switch_to(Fiber* self, Thread* thread) {
  if (thread->fiber == nullptr) thread->fiber = acquire_fiber(fiber_main);
  activate(thread);
  switch_fiber(self, thread->fiber);
}

void run_thread() {
  Launch& launch = *launch_now;
  acquire_order(&launch.begin_order);
  try {
#if defined(BRAZE_EMULATOR_MSAN)
    __msan_unpoison_param(2);
#endif
    launch.call->invoke(launch.call->function, launch.call->arguments);
    Block& block = *block_now;
    Thread& thread = *thread_now;
    thread_exits(block, thread);
  } catch (...) {
    launch.error = std::current_exception();
  }
  release_order(&launch.end_order);
}

// Runs threads that have not started, one after another on this stack, until one must wait that has
// a stack of its own.
void fiber_main() {
  Fiber* const self = thread_now->fiber;
  fiber_entered(self);
  for (;;) {
    run_thread();
    Launch& launch = *launch_now;
    Thread* next = launch.error ? nullptr : pick();
    if (next != nullptr && next->fiber == nullptr && !kTsan) {
      thread_now->fiber = nullptr;
      next->fiber = self;
      activate(next);
      continue;
    }
    thread_now->fiber = nullptr;
    // TSan sees two threads on one stack as a race: there each has its own.
    if (kTsan) {
      launch.retired.push_back(self);
    } else {
      release_fiber(self);
    }
    if (next == nullptr) {
      switch_fiber(self, &launch.host);
    } else {
      switch_to(self, next);
    }
  }
}

std::unique_ptr<Block> make_block(const Launch& launch, uint64_t number) {
  const dim3& grid = launch.config->grid;
  const dim3& size = launch.config->block;
  auto block = std::make_unique<Block>();
  block->index =
      uint3{static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
            static_cast<unsigned>(number / grid.x / grid.y)};
  const unsigned count = size.x * size.y * size.z;
  block->threads.resize(count);
  block->warps.resize((count + 31) / 32);
  for (unsigned i = 0; i < count; ++i) {
    block->threads[i].index = uint3{i % size.x, i / size.x % size.y, i / size.x / size.y};
    block->threads[i].number = i;
    block->warps[i / 32].existing |= 1u << i % 32;
  }
  return block;
}

// A block that has run, for its next index.
void restart(Launch& launch, Block& block, uint64_t number) {
  const dim3& grid = launch.config->grid;
  block.index =
      uint3{static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
            static_cast<unsigned>(number / grid.x / grid.y)};
  block.alive = static_cast<unsigned>(block.threads.size());
  for (Thread& thread : block.threads) thread.exited = false;
  for (Warp& warp : block.warps) warp.exited = 0;
  block.barrier.generation = 0;
  recycle_cells(block);
  if (const size_t bytes = launch.config->shared_bytes) {
    Unobserved unobserved;
    if (block.dynamic == nullptr && posix_memalign(&block.dynamic, 128, bytes) != 0) {
      fail("no memory for a block's dynamic shared memory");
    }
    fill_poison(block.dynamic, bytes);
  }
  launch.alive += block.alive;
  set_up_order(block);
}

// Runs the blocks that are alive until all threads have exited.
void run_blocks(Launch& launch) {
  if (kTsan) {
    size_t threads = 0;
    for (const auto& block : launch.blocks) threads += block->threads.size();
    launch.retired.reserve(threads);
    prepare_fibers(threads, fiber_main);
    release_order(&launch.begin_order);
  }
  switch_to(&launch.host, pick());
  acquire_order(&launch.end_order);
  if (launch.error) std::rethrow_exception(launch.error);
  if (launch.alive > 0) fail(deadlock_text());
}

void retire(Launch& launch) {
  for (Fiber* fiber : launch.retired) release_fiber(fiber);
  launch.retired.clear();
}

// Block numbers [0, count) in the schedule's order, without a table of them.
class BlockOrder {
 public:
  BlockOrder(uint64_t count, Launch& launch) : count_(count) {
    if (launch.schedule.order == Order::reverse) {
      step_ = count - 1;
      start_ = count - 1;
    } else if (launch.schedule.order >= Order::random) {
      start_ = random(launch) % count;
      do {
        step_ = random(launch) % count;
      } while (std::gcd(step_, count) != 1);
    }
  }
  uint64_t operator[](uint64_t i) const {
    return static_cast<uint64_t>((static_cast<emulator_uint128>(i) * step_ + start_) % count_);
  }

 private:
  static uint64_t random(Launch& launch) {
    return static_cast<uint64_t>(launch.random.next()) << 32 | launch.random.next();
  }
  uint64_t count_, start_ = 0, step_ = 1;
};

void run_all(Launch& launch) {
  const dim3& grid = launch.config->grid;
  const uint64_t total = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  const uint64_t begin = std::min(settings().block_begin, total);
  const uint64_t end = std::max(begin, std::min(settings().block_end, total));
  if (begin == end) return;
  const BlockOrder order(end - begin, launch);
  const size_t threads =
      static_cast<size_t>(launch.config->block.x) * launch.config->block.y * launch.config->block.z;
  const bool concurrent = kTsan && settings().concurrent_blocks;
  constexpr size_t kMaxTsanThreads = 7000;
  if (kTsan && (concurrent || launch.config->cooperative) &&
      (end - begin) * threads > kMaxTsanThreads) {
    fail("TSan tells at most " + std::to_string(kMaxTsanThreads) +
         " threads apart and this launch has " + std::to_string((end - begin) * threads) +
         "; test a smaller grid");
  }
  if (launch.config->cooperative) {
    if (end - begin != total) fail("a cooperative launch cannot run some of its blocks only");
    for (uint64_t b = 0; b < total; ++b) {
      launch.blocks.push_back(make_block(launch, b));
      restart(launch, *launch.blocks.back(), b);
    }
    block_now = nullptr;
    run_blocks(launch);
    return;
  }
  if (concurrent) {
    // Their stacks and shared memory stay apart; only atomics order them.
    launch.retired.reserve((end - begin) * threads);
    prepare_fibers((end - begin) * threads, fiber_main);
    release_order(&launch.begin_order);
  }
  std::vector<std::unique_ptr<Block>> finished;
  for (uint64_t i = 0; i < end - begin; ++i) {
    const uint64_t number = begin + order[i];
    if (launch.blocks.empty()) launch.blocks.push_back(make_block(launch, number));
    restart(launch, *launch.blocks[0], number);
    block_now = launch.blocks[0].get();
    if (concurrent) {
      switch_to(&launch.host, pick());
      if (launch.error) std::rethrow_exception(launch.error);
      if (launch.alive > 0) fail(deadlock_text());
      finished.push_back(std::move(launch.blocks[0]));
      launch.blocks.clear();
    } else {
      run_blocks(launch);
      retire(launch);
    }
  }
  acquire_order(&launch.end_order);
  for (auto& block : finished) launch.blocks.push_back(std::move(block));
}

void clean_up(Launch& launch) {
  retire(launch);
  for (auto& block : launch.blocks) {
    for (Thread& thread : block->threads) {
      if (thread.fiber != nullptr) abandon_fiber(thread.fiber);
    }
    recycle_cells(*block);
    free(block->dynamic);
  }
  free_cells();
  launch_now = nullptr;
  block_now = nullptr;
  thread_now = nullptr;
  preemption_enabled = false;
}

}  // namespace

void suspend() {
  Thread* const self = thread_now;
  Thread* const next = pick();
  if (next == self) return;
  if (next == nullptr) {
    switch_fiber(self->fiber, &launch_now->host);
  } else {
    switch_to(self->fiber, next);
  }
}

void preempt() {
  if (launch_now == nullptr || thread_now == nullptr) return;
  constexpr double kScale = 4294967296.0;
  if (launch_now->random.next() >= launch_now->schedule.preemption * kScale) return;
  make_ready(*block_now, thread_now->number / 32, 1u << thread_now->number % 32);
  suspend();
}

void run_launch(const LaunchConfig& config, const KernelCall& call, uint64_t launch_number) {
  if (launch_now != nullptr)
    fail("a kernel launched a kernel; dynamic parallelism is not modelled");
  Launch launch;
  launch.config = &config;
  launch.call = &call;
  launch.schedule = settings().schedule;
  launch.random.seed(launch.schedule.seed * 1000003u + launch_number);
  watch_stacks();
  bind_host_fiber(&launch.host);
  launch_now = &launch;
  preemption_enabled = launch.schedule.preemption > 0;
  blockDim = config.block;
  gridDim = config.grid;
  try {
    run_all(launch);
  } catch (...) {
    clean_up(launch);
    throw;
  }
  clean_up(launch);
}

std::string running_launch() {
  if (launch_now == nullptr) return "";
  const LaunchConfig& config = *launch_now->config;
  return std::string("kernel ") + config.kernel_name + ", launched at " + text(config.site);
}

std::string who(const Block& block, const Thread& thread) {
  return "thread " + text(thread.index) + " of block " + text(block.index);
}

}  // namespace emulator
