// Warp collectives: every lane of the mask arrives, the last one computes all results.
#include <bit>

#include "scheduler.h"

#if defined(BRAZE_EMULATOR_MSAN)
#include <sanitizer/msan_interface.h>
#endif

namespace emulator {
namespace {

const char* name(WarpOp op) {
  constexpr const char* kNames[] = {"__syncwarp",        "__shfl_sync",       "__shfl_up_sync",
                                    "__shfl_down_sync",  "__shfl_xor_sync",   "__ballot_sync",
                                    "__any_sync",        "__all_sync",        "__match_any_sync",
                                    "ldmatrix",          "ldmatrix.trans",    "mma of bf16",
                                    "mma of f16",        "__reduce_add_sync", "__reduce_min_sync",
                                    "__reduce_max_sync", "__reduce_min_sync", "__reduce_max_sync",
                                    "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  return kNames[static_cast<int>(op)];
}

// What a lane reads that nobody supplies.
constexpr uint64_t kPoison = ~uint64_t{0};

int source_lane(const Thread& thread, int lane) {
  const int width = thread.width;
  const int first = lane & ~(width - 1), last = first + width - 1;
  switch (thread.op) {
    case WarpOp::shfl: return first + (thread.operand & (width - 1));
    case WarpOp::shfl_up: return lane - thread.operand < first ? lane : lane - thread.operand;
    case WarpOp::shfl_down: return lane + thread.operand > last ? lane : lane + thread.operand;
    default: return (lane ^ thread.operand) > last ? lane : lane ^ thread.operand;
  }
}

template <class T, class Combine>
uint64_t fold(const Thread* lanes, uint32_t mask, Combine combine) {
  T total = static_cast<T>(lanes[std::countr_zero(mask)].value);
  for (uint32_t left = mask & (mask - 1); left != 0; left &= left - 1) {
    total = combine(total, static_cast<T>(lanes[std::countr_zero(left)].value));
  }
  return static_cast<uint32_t>(total);
}

uint64_t reduction(WarpOp op, const Thread* lanes, uint32_t mask) {
  switch (op) {
    case WarpOp::reduce_add:
      return fold<uint32_t>(lanes, mask, [](uint32_t a, uint32_t b) { return a + b; });
    case WarpOp::reduce_min:
      return fold<int32_t>(lanes, mask, [](int32_t a, int32_t b) { return min(a, b); });
    case WarpOp::reduce_max:
      return fold<int32_t>(lanes, mask, [](int32_t a, int32_t b) { return max(a, b); });
    case WarpOp::reduce_umin:
      return fold<uint32_t>(lanes, mask, [](uint32_t a, uint32_t b) { return min(a, b); });
    case WarpOp::reduce_umax:
      return fold<uint32_t>(lanes, mask, [](uint32_t a, uint32_t b) { return max(a, b); });
    case WarpOp::reduce_and:
      return fold<uint32_t>(lanes, mask, [](uint32_t a, uint32_t b) { return a & b; });
    case WarpOp::reduce_or:
      return fold<uint32_t>(lanes, mask, [](uint32_t a, uint32_t b) { return a | b; });
    default: return fold<uint32_t>(lanes, mask, [](uint32_t a, uint32_t b) { return a ^ b; });
  }
}

uint32_t ballot(const Thread* lanes, uint32_t mask) {
  uint32_t bits = 0;
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    if (lanes[lane].value) bits |= 1u << lane;
  }
  return bits;
}

void resolve(WarpOp op, Thread* lanes, uint32_t mask) {
  uint64_t common = 0;
  if (op == WarpOp::ballot) common = ballot(lanes, mask);
  if (op == WarpOp::any) common = ballot(lanes, mask) != 0;
  if (op == WarpOp::all) common = ballot(lanes, mask) == mask;
  if (op >= WarpOp::reduce_add) common = reduction(op, lanes, mask);
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    Thread& thread = lanes[lane];
    if (op >= WarpOp::shfl && op <= WarpOp::shfl_xor) {
      const int source = source_lane(thread, lane);
      const bool supplied = source >= 0 && source < 32 && (mask >> source & 1u);
      thread.result = supplied ? lanes[source].value : kPoison;
    } else if (op == WarpOp::match_any) {
      thread.result = 0;
      for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        const int other = std::countr_zero(rest);
        if (lanes[other].value == thread.value) thread.result |= 1u << other;
      }
    } else {
      thread.result = common;
    }
  }
}

void check_mask(const Block& block, const Thread& thread, const Warp& warp) {
  const auto where = [&] {
    return std::string(name(thread.op)) + " at " + text(thread.site) + ", " + who(block, thread);
  };
  const unsigned lane = thread.number % 32;
  const int width = thread.width;
  if (!(thread.mask >> lane & 1u)) {
    fail(where() + ": the mask does not name the caller's own lane " + std::to_string(lane));
  }
  if (thread.mask & ~warp.existing) {
    fail(where() + ": the mask names lanes that this last, partial warp does not have");
  }
  if (const uint32_t exited = thread.mask & warp.exited) {
    fail(where() + ": the mask names lane " + std::to_string(std::countr_zero(exited)) +
         ", which has exited");
  }
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0) {
    fail(where() + ": the width is " + std::to_string(width) + ", not a power of two up to 32");
  }
}

// Lanes that wait and that this one is in a collective with must be in the same one.
void check_partners(const Block& block, const Thread& thread, const Warp& warp,
                    const Thread* lanes) {
  const unsigned lane = thread.number % 32;
  for (uint32_t left = warp.at_collective; left != 0; left &= left - 1) {
    const int other = std::countr_zero(left);
    const Thread& partner = lanes[other];
    const bool related = (thread.mask >> other & 1u) || (partner.mask >> lane & 1u);
    if (!related) continue;
    const bool agree = partner.mask == thread.mask && partner.op == thread.op &&
                       partner.site.line == thread.site.line &&
                       strcmp(partner.site.file, thread.site.file) == 0;
    // The others agree with the first: they were checked against it.
    if (agree) return;
    char masks[64];
    snprintf(masks, sizeof(masks), "masks 0x%08x and 0x%08x", thread.mask, partner.mask);
    fail("warp divergence: " + who(block, thread) + " is in " + name(thread.op) + " at " +
         text(thread.site) + ", but thread " + text(partner.index) + " of its mask is in " +
         name(partner.op) + " at " + text(partner.site) + " (" + masks +
         "). All lanes of a mask must call the same collective with the same mask");
  }
}

}  // namespace

uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int operand, int width,
                         Site site) {
  if (launch_now == nullptr) fail(std::string(name(op)) + " outside a kernel, at " + text(site));
  Block& block = *block_now;
  Thread& thread = *thread_now;
  Warp& warp = warp_of(block, thread);
  const bool orders_memory = op == WarpOp::sync;
  if (orders_memory && barrier_reached(site, name(op))) return 0;
  Thread* const lanes = &block.threads[thread.number / 32 * 32];
  thread.op = op;
  thread.mask = mask;
  thread.value = value;
  thread.operand = operand;
  thread.width = width;
  thread.site = site;
  check_mask(block, thread, warp);
  check_partners(block, thread, warp, lanes);
  const int leader = std::countr_zero(mask);
  char* const order = &warp.order[leader][warp.generation[leader] & 1];
  if (orders_memory) release_order(order);
  warp.at_collective |= 1u << thread.number % 32;
  thread.wait = Wait::warp;
  if ((warp.at_collective & mask) == mask) {
    if (op >= WarpOp::ldmatrix && op <= WarpOp::mma_f16) {
      uint32_t* registers[32];
      for (int i = 0; i < 32; ++i) registers[i] = reinterpret_cast<uint32_t*>(lanes[i].value);
      compute_matrices(op, registers);
    } else {
      resolve(op, lanes, mask);
    }
    warp.at_collective &= ~mask;
    ++warp.generation[leader];
    make_ready(block, thread.number / 32, mask);
  }
  suspend();
  thread.wait = Wait::none;
  if (orders_memory) acquire_order(order);
  return thread.result;
}

void warp_matrices(WarpOp op, uint32_t* registers, Site site) {
#if defined(BRAZE_EMULATOR_MSAN)
  const size_t words = op < WarpOp::mma_bf16 ? 4 : 10;
  __msan_check_mem_is_initialized(registers, words * sizeof(uint32_t));
#endif
  warp_collective(op, ~0u, reinterpret_cast<uint64_t>(registers), 0, 32, site);
}

unsigned active_mask() {
  if (launch_now == nullptr) fail("__activemask outside a kernel");
  const Warp& warp = warp_of(*block_now, *thread_now);
  return warp.existing & ~warp.exited;
}

}  // namespace emulator
