// __syncthreads, and what happens when a thread exits.
#include <map>

#include "scheduler.h"

namespace emulator {
namespace {

constexpr const char* kName = "__syncthreads";

void open_if_complete(Block& block) {
  if (block.barrier.waiting == 0 || block.barrier.waiting < block.alive) return;
  block.barrier.waiting = 0;
  ++block.barrier.generation;
  for (unsigned w = 0; w < block.warps.size(); ++w) {
    make_ready(block, w, block.warps[w].at_block);
    block.warps[w].at_block = 0;
  }
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

const char* waiting_at(const Thread& thread) {
  switch (thread.wait) {
    case Wait::block: return kName;
    case Wait::warp: return "a warp collective";
    case Wait::none: return "nothing";
  }
  return "";
}

}  // namespace

void block_barrier(Site site) {
  if (launch_now == nullptr) fail(std::string(kName) + " outside a kernel, at " + text(site));
  Block& block = *block_now;
  Thread& thread = *thread_now;
  if (barrier_reached(site, kName)) return;
  Barrier& barrier = block.barrier;
  if (barrier.waiting == 0) {
    barrier.site = site;
    barrier.first = &thread;
  } else if (!same(barrier.site, site)) {
    fail("barrier divergence: " + who(block, thread) + " waits at " + text(site) + ", but thread " +
         text(barrier.first->index) + " waits at " + text(barrier.site) +
         ". All threads that have not exited must reach the same barrier");
  }
  char& order = barrier.order[barrier.generation & 1];
  release_order(&order);
  ++barrier.waiting;
  thread.site = site;
  thread.wait = Wait::block;
  warp_of(block, thread).at_block |= 1u << thread.number % 32;
  open_if_complete(block);
  suspend();
  thread.wait = Wait::none;
  acquire_order(&order);
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
        group.text =
            who(*block, thread) + " waits in " + waiting_at(thread) + " at " + text(thread.site);
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
