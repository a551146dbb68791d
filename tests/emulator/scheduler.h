// One launch: blocks, warps, threads, and who runs next.
#pragma once
#include <deque>
#include <exception>
#include <memory>
#include <vector>

#include "fiber.h"
#include "internal.h"

namespace emulator {

enum class Wait : uint8_t { none, block, grid, warp };

struct Thread {
  Fiber* fiber = nullptr;  // null until it starts
  uint3 index{};
  unsigned number = 0;  // x fastest
  Wait wait = Wait::none;
  bool exited = false;
  // Its part in a warp collective.
  WarpOp op{};
  uint32_t mask = 0;
  int operand = 0, width = 32;
  uint64_t value = 0, result = 0;
  Site site{};
};

// Bit i is lane i.
struct Warp {
  uint32_t existing = 0, exited = 0;
  uint32_t ready = 0, at_block = 0, at_grid = 0, at_collective = 0;
  unsigned rotation = 0;  // where pct starts among the lanes
  unsigned rank = 0;      // pct: 0 runs first
  uint8_t generation[32] = {};
  char order[32][2] = {};  // TSan: what a collective's lanes are ordered by, per lowest lane
};

// All threads of a block wait at one, or all of a grid.
struct Barrier {
  unsigned waiting = 0;
  unsigned generation = 0;
  Site site{};
  BarrierKind kind{};
  const Thread* first = nullptr;
  int true_count = 0, result = 0;
  char order[2] = {};
};

struct SharedCell {
  const void* key;
  void* address;
  size_t bytes;
};

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t ready_warps = 0;  // pct: by rank; else by number
  uint8_t at_rank[32] = {};
  unsigned alive = 0;
  unsigned last = 0;  // number of the thread that ran last
  Barrier barrier;
  std::vector<SharedCell> cells;
  void* dynamic = nullptr;
  size_t static_bytes = 0;
};

struct Launch {
  const LaunchConfig* config;
  const KernelCall* call;
  std::vector<std::unique_ptr<Block>> blocks;  // alive now
  std::vector<Fiber*> retired;                 // TSan: not reusable yet
  std::vector<SharedCell> spare_cells;
  Barrier grid;
  unsigned alive = 0;
  Random random;
  Schedule schedule;
  Fiber host;
  std::exception_ptr error;
  char begin_order = 0, end_order = 0;
};

extern Launch* launch_now;
extern Block* block_now;
extern Thread* thread_now;

inline Warp& warp_of(Block& block, const Thread& thread) { return block.warps[thread.number / 32]; }

void make_ready(Block& block, unsigned warp, uint32_t lanes);
// Another thread runs; returns when this one is ready again.
void suspend();
// Next to run, no longer marked ready; null if nobody is ready.
Thread* pick();
void set_up_order(Block& block);
std::string who(const Block& block, const Thread& thread);
std::string deadlock_text();
void thread_exits(Block& block, Thread& thread);
// What such an instruction makes of the registers of a warp's lanes.
void compute_matrices(WarpOp op, uint32_t* const (&registers)[32]);
void free_cells();
void recycle_cells(Block& block);

}  // namespace emulator
