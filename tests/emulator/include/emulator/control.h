// What a test can set and ask: schedules, barrier sites, devices, streams.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

// A rule of CUDA that a kernel broke; leaves the launch (or the call that ran it).
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { inorder, reverse, random, pct };

struct Schedule {
  Order order = Order::inorder;
  uint64_t seed = 0;
  double preemption = 0;  // probability of a switch at an atomic
};

// The default comes from BRAZE_EMULATOR_ORDER, _SEED and _YIELD.
Schedule schedule();
void set_schedule(const Schedule& schedule);
std::string describe(const Schedule& schedule);

// Ends the process at an error, for a debugger. Default: BRAZE_EMULATOR_ABORT=1.
void set_abort_on_error(bool abort);
// Prints errors to stderr besides throwing them (default).
void set_print_errors(bool print);

struct BarrierSite {
  std::string file;
  int line;
  std::string kind;
};
// Every barrier reached so far, in the order of first arrival.
std::vector<BarrierSite> barrier_sites();
// Deletes the barrier with this index, or at "file:line" (file may be the end of its path); "" for
// none. Default: BRAZE_EMULATOR_DROP_BARRIER.
void drop_barrier(const std::string& site);
// How many arrivals at the dropped barrier were let through.
int64_t dropped_arrivals();

// Of later launches only blocks [begin, end) run, counted x fastest.
void set_block_range(uint64_t begin, uint64_t end);
void clear_block_range();

// TSan: blocks of one launch are not ordered by running one after another.
// Default: BRAZE_EMULATOR_TSAN_MODE=B; else A.
void set_concurrent_blocks(bool concurrent);

// Stack of one CUDA thread, for stacks made later. Default: BRAZE_EMULATOR_STACK_KB, or 64.
void set_stack_bytes(size_t bytes);

void set_device_count(int count);      // 2
void set_blocks_per_processor(int n);  // what the occupancy query answers: 4
void set_cooperative_blocks(int n);    // the most blocks a cooperative launch may have: 132 * 2
void set_null_launch(bool null);       // launches are checked and counted, kernels do not run
int64_t launch_count(int device);
void reset_launch_count();

// Work is queued and runs when something waits for it, in an order drawn from the schedule's seed.
void set_deferred(bool deferred);
size_t pending_work();

// Fiber switches so far.
uint64_t switch_count();

// Forgets launches, errors, sites, queued work and every setting of this header.
void reset();

}  // namespace emulator
