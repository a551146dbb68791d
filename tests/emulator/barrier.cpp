// __syncthreads and its kin, the grid barrier, and what happens when a thread exits.
#include <map>

#include "scheduler.h"

namespace emulator {
namespace {

const char* name(BarrierKind kind) {
  switch (kind) {
    case BarrierKind::plain: return "__syncthreads";
    case BarrierKind::count: return "__syncthreads_count";
    case BarrierKind::all: return "__syncthreads_and";
    case BarrierKind::any: return "__syncthreads_or";
    case BarrierKind::grid: return "grid_sync";
  }
  return "";
}

int outcome(const Barrier& barrier) {
  switch (barrier.kind) {
    case BarrierKind::count: return barrier.true_count;
    case BarrierKind::all: return barrier.true_count == static_cast<int>(barrier.waiting);
    case BarrierKind::any: return barrier.true_count > 0;
    default: return 0;
  }
}

void open(Barrier& barrier) {
  barrier.result = outcome(barrier);
  barrier.waiting = 0;
  barrier.true_count = 0;
  ++barrier.generation;
}

void open_if_complete(Block& block) {
  if (block.barrier.waiting == 0 || block.barrier.waiting < block.alive) return;
  open(block.barrier);
  for (unsigned w = 0; w < block.warps.size(); ++w) {
    make_ready(block, w, block.warps[w].at_block);
    block.warps[w].at_block = 0;
  }
}

void open_grid_if_complete() {
  Barrier& grid = launch_now->grid;
  if (grid.waiting == 0 || grid.waiting < launch_now->alive) return;
  open(grid);
  for (auto& block : launch_now->blocks) {
    for (unsigned w = 0; w < block->warps.size(); ++w) {
      make_ready(*block, w, block->warps[w].at_grid);
      block->warps[w].at_grid = 0;
    }
  }
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

const char* waiting_at(const Thread& thread, const Block& block) {
  switch (thread.wait) {
    case Wait::block: return name(block.barrier.kind);
    case Wait::grid: return "grid_sync";
    case Wait::warp: return "a warp collective";
    case Wait::none: return "nothing";
  }
  return "";
}

}  // namespace

int block_barrier(BarrierKind kind, int predicate, Site site) {
  if (launch_now == nullptr) fail(std::string(name(kind)) + " outside a kernel, at " + text(site));
  Block& block = *block_now;
  Thread& thread = *thread_now;
  const bool whole_grid = kind == BarrierKind::grid;
  if (whole_grid && !launch_now->config->cooperative) {
    fail("grid_sync at " + text(site) + " in an ordinary launch; use BRAZE_LAUNCH_COOPERATIVE");
  }
  if (barrier_reached(site, name(kind))) return predicate != 0;
  Barrier& barrier = whole_grid ? launch_now->grid : block.barrier;
  if (barrier.waiting == 0) {
    barrier.site = site;
    barrier.kind = kind;
    barrier.first = &thread;
  } else if (!same(barrier.site, site) || barrier.kind != kind) {
    fail("barrier divergence: " + who(block, thread) + " waits in " + name(kind) + " at " +
         text(site) + ", but thread " + text(barrier.first->index) + " waits in " +
         name(barrier.kind) + " at " + text(barrier.site) +
         ". All threads that have not exited must reach the same barrier");
  }
  char& order = barrier.order[barrier.generation & 1];
  release_order(&order);
  ++barrier.waiting;
  barrier.true_count += predicate != 0;
  thread.site = site;
  thread.wait = whole_grid ? Wait::grid : Wait::block;
  Warp& warp = warp_of(block, thread);
  (whole_grid ? warp.at_grid : warp.at_block) |= 1u << thread.number % 32;
  if (whole_grid) {
    open_grid_if_complete();
  } else {
    open_if_complete(block);
  }
  suspend();
  thread.wait = Wait::none;
  acquire_order(&order);
  return barrier.result;
}

void thread_exits(Block& block, Thread& thread) {
  Warp& warp = warp_of(block, thread);
  const unsigned lane = thread.number % 32;
  for (uint32_t left = warp.at_collective; left != 0; left &= left - 1) {
    const unsigned other = thread.number / 32 * 32 + static_cast<unsigned>(__builtin_ctz(left));
    if (block.threads[other].mask >> lane & 1u) {
      fail("warp collective at " + text(block.threads[other].site) + ": " +
           who(block, block.threads[other]) + " waits for lane " + std::to_string(lane) +
           ", which its mask names and which has exited");
    }
  }
  warp.exited |= 1u << lane;
  thread.exited = true;
  --block.alive;
  --launch_now->alive;
  open_if_complete(block);
  if (launch_now->config->cooperative) open_grid_if_complete();
}

std::string deadlock_text() {
  struct Group {
    unsigned count;
    std::string text;
  };
  std::map<std::pair<std::string, int>, Group> groups;
  for (const auto& block : launch_now->blocks) {
    for (const Thread& thread : block->threads) {
      if (thread.exited || thread.wait == Wait::none) continue;
      Group& group = groups[{thread.site.file, thread.site.line}];
      if (group.count++ == 0) {
        group.text = who(*block, thread) + " waits in " + waiting_at(thread, *block) + " at " +
                     text(thread.site);
      }
    }
  }
  std::string result = "deadlock: no thread can run.";
  for (const auto& [site, group] : groups) {
    result += " " + group.text;
    if (group.count > 1) result += " (and " + std::to_string(group.count - 1) + " more there)";
    result += ";";
  }
  result += " some threads of a barrier's block or of a collective's mask never arrive there";
  return result;
}

}  // namespace emulator
