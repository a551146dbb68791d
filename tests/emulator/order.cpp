// Who runs next: constant time per pick, for blocks of 1,024 threads.
#include <bit>

#include "scheduler.h"

namespace emulator {
namespace {

// Of the picks of random and pct, the share that moves on to another block or rotates a warp's
// lanes.
constexpr uint32_t kMoveInterval = 24;
// Of pct's picks, the share that demotes a warp: so rare that the first warp gets whole phases
// ahead.
constexpr uint32_t kDemotionInterval = 2048;

unsigned slot(const Block& block, unsigned warp) {
  return launch_now->schedule.order == Order::pct ? block.warps[warp].rank : warp;
}

unsigned nth_bit(uint32_t bits, unsigned n) {
  for (; n > 0; --n) bits &= bits - 1;
  return static_cast<unsigned>(std::countr_zero(bits));
}

uint32_t above(unsigned bit) { return bit >= 31 ? 0 : ~0u << (bit + 1); }
uint32_t below(unsigned bit) { return (1u << bit) - 1; }

unsigned pick_up(const Block& block) {
  const unsigned warp = block.last / 32;
  const uint32_t later = block.warps[warp].ready & above(block.last % 32);
  if (later) return warp * 32 + static_cast<unsigned>(std::countr_zero(later));
  const uint32_t warps = block.ready_warps & above(warp);
  const auto next = static_cast<unsigned>(std::countr_zero(warps ? warps : block.ready_warps));
  return next * 32 + static_cast<unsigned>(std::countr_zero(block.warps[next].ready));
}

unsigned pick_down(const Block& block) {
  const unsigned warp = block.last / 32;
  const uint32_t later = block.warps[warp].ready & below(block.last % 32);
  if (later) return warp * 32 + 31 - static_cast<unsigned>(std::countl_zero(later));
  const uint32_t warps = block.ready_warps & below(warp);
  const auto next = 31 - static_cast<unsigned>(std::countl_zero(warps ? warps : block.ready_warps));
  return next * 32 + 31 - static_cast<unsigned>(std::countl_zero(block.warps[next].ready));
}

unsigned pick_random(const Block& block) {
  Random& random = launch_now->random;
  const auto count = static_cast<uint32_t>(std::popcount(block.ready_warps));
  const unsigned warp = nth_bit(block.ready_warps, random.below(count));
  const uint32_t ready = block.warps[warp].ready;
  return warp * 32 + nth_bit(ready, random.below(static_cast<uint32_t>(std::popcount(ready))));
}

// The warp goes behind all others.
void demote(Block& block, unsigned warp) {
  const unsigned rank = block.warps[warp].rank;
  const auto last = static_cast<unsigned>(block.warps.size()) - 1;
  const bool ready = block.ready_warps >> rank & 1u;
  for (unsigned r = rank; r < last; ++r) {
    block.at_rank[r] = block.at_rank[r + 1];
    block.warps[block.at_rank[r]].rank = r;
  }
  block.at_rank[last] = static_cast<uint8_t>(warp);
  block.warps[warp].rank = last;
  const uint32_t behind = block.ready_warps >> 1 & ~below(rank);
  block.ready_warps = (block.ready_warps & below(rank)) | behind;
  block.ready_warps = (block.ready_warps & ~(1u << last)) | static_cast<uint32_t>(ready) << last;
}

unsigned pick_pct(Block& block) {
  Random& random = launch_now->random;
  if (random.below(kDemotionInterval) == 0) {
    demote(block, block.at_rank[std::countr_zero(block.ready_warps)]);
  }
  const unsigned warp = block.at_rank[std::countr_zero(block.ready_warps)];
  Warp& chosen = block.warps[warp];
  const auto turned = std::rotr(chosen.ready, static_cast<int>(chosen.rotation));
  const unsigned lane = (static_cast<unsigned>(std::countr_zero(turned)) + chosen.rotation) % 32;
  // Lanes take turns, so that a lane that waits in a loop does not starve the others.
  if (random.below(kMoveInterval) == 0) chosen.rotation = random.below(32);
  return warp * 32 + lane;
}

Block* block_with_ready_threads() {
  std::vector<std::unique_ptr<Block>>& blocks = launch_now->blocks;
  if (blocks.size() == 1) return blocks[0]->ready_warps ? blocks[0].get() : nullptr;
  const bool move =
      launch_now->schedule.order >= Order::random && launch_now->random.below(kMoveInterval) == 0;
  if (!move && block_now != nullptr && block_now->ready_warps) return block_now;
  const auto count = static_cast<uint32_t>(blocks.size());
  const uint32_t start =
      launch_now->schedule.order >= Order::random ? launch_now->random.below(count) : 0;
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t at = (start + i) % count;
    if (launch_now->schedule.order == Order::reverse) at = count - 1 - at;
    if (blocks[at]->ready_warps) return blocks[at].get();
  }
  return nullptr;
}

}  // namespace

void set_up_order(Block& block) {
  const auto warps = static_cast<unsigned>(block.warps.size());
  for (unsigned w = 0; w < warps; ++w) {
    block.at_rank[w] = static_cast<uint8_t>(w);
    block.warps[w].rotation = launch_now->random.below(32);
  }
  for (unsigned w = warps; w > 1; --w) {
    std::swap(block.at_rank[w - 1], block.at_rank[launch_now->random.below(w)]);
  }
  for (unsigned r = 0; r < warps; ++r) block.warps[block.at_rank[r]].rank = r;
  // So that the first pick is thread 0, or the last.
  const bool down = launch_now->schedule.order == Order::reverse;
  block.last = down ? 0 : warps * 32 - 1;
  block.ready_warps = 0;
  for (unsigned w = 0; w < warps; ++w) make_ready(block, w, block.warps[w].existing);
}

void make_ready(Block& block, unsigned warp, uint32_t lanes) {
  if (lanes == 0) return;
  block.warps[warp].ready |= lanes;
  block.ready_warps |= 1u << slot(block, warp);
}

Thread* pick() {
  Block* block = block_with_ready_threads();
  if (block == nullptr) return nullptr;
  unsigned number = 0;
  switch (launch_now->schedule.order) {
    case Order::inorder: number = pick_up(*block); break;
    case Order::reverse: number = pick_down(*block); break;
    case Order::random: number = pick_random(*block); break;
    case Order::pct: number = pick_pct(*block); break;
  }
  Warp& warp = block->warps[number / 32];
  warp.ready &= ~(1u << number % 32);
  if (warp.ready == 0) block->ready_warps &= ~(1u << slot(*block, number / 32));
  block->last = number;
  block_now = block;
  return &block->threads[number];
}

}  // namespace emulator
