// A stack of its own, and switching to it; the sanitizers are told.
#pragma once
#include <cstddef>
#include <vector>

namespace emulator {

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest usable address; null for the host's own stack
  size_t stack_bytes = 0;
  void* tsan = nullptr;        // TSan's notion of a thread
  void* fake_stack = nullptr;  // ASan's
  const void* bottom = nullptr;
  size_t bottom_bytes = 0;
  bool entered = false;
};

// A new fiber starts in `entry`, which never returns.
Fiber* acquire_fiber(void (*entry)());
void release_fiber(Fiber* fiber);
// For a fiber left in the middle of its work: starts afresh.
void abandon_fiber(Fiber* fiber);
// Under TSan, from the host before a launch: a fiber made by another is ordered after it.
void prepare_fibers(size_t count, void (*entry)());
// The first thing a fiber does.
void fiber_entered(Fiber* self);
void switch_fiber(Fiber* from, Fiber* to);
void set_fiber_stack_bytes(size_t bytes);
// The host's stack, for the calling OS thread.
void bind_host_fiber(Fiber* host);
bool in_guard_page(const void* address);
void watch_stacks();

#if defined(BRAZE_EMULATOR_TSAN)
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif

// Happens-before, for TSan alone.
void release_order(void* object);
void acquire_order(void* object);
// What the emulator itself does is invisible to TSan.
struct Unobserved {
  Unobserved();
  ~Unobserved();
};

}  // namespace emulator
