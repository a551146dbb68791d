#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(BRAZE_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// void emulator_switch(void** save, void* load): callee-saved registers go to the old stack, and
// come from the new one.
extern "C" void emulator_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, %function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch, .-emulator_switch
)");
#else
#error "emulator: no context switch for this processor; add one here (x86-64 and aarch64 exist)"
#endif

namespace emulator {
namespace {

constexpr size_t kSanitizedFactor =
#if defined(__SANITIZE_ADDRESS__) || defined(BRAZE_EMULATOR_TSAN) || defined(BRAZE_EMULATOR_MSAN)
    4;
#else
    1;
#endif

// Every guard page costs the kernel two mappings, of about 65,000.
constexpr size_t kMaxGuarded = 8192;

struct Pool {
  std::vector<Fiber*> idle;
  std::vector<Fiber*> all;
  size_t stack_bytes = 0;
  uint64_t switches = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

// The fiber that switched to the running one.
Fiber* previous = nullptr;

size_t stack_bytes() {
  size_t& bytes = pool().stack_bytes;
  if (bytes == 0) {
    const char* kilobytes = getenv("BRAZE_EMULATOR_STACK_KB");
    bytes = (kilobytes ? strtoull(kilobytes, nullptr, 10) : 64) * 1024 * kSanitizedFactor;
  }
  return bytes;
}

void set_start(Fiber* fiber, void (*entry)()) {
  // Staggered: stacks at equal offsets from a power of two share cache sets.
  const size_t stagger = pool().all.size() % 61 * 64;
  const auto top = reinterpret_cast<uintptr_t>(fiber->stack + fiber->stack_bytes) - stagger;
#if defined(__x86_64__)
  // entry's own stack pointer: 8 past a multiple of 16, as after a call.
  auto** words = reinterpret_cast<void**>(top - 16);
  words[0] = reinterpret_cast<void*>(entry);
  words[1] = nullptr;
  constexpr int kRegisters = 6;
  for (int i = 1; i <= kRegisters; ++i) words[-i] = nullptr;
  fiber->stack_pointer = words - kRegisters;
#elif defined(__aarch64__)
  auto** words = reinterpret_cast<void**>(top - 160);
  for (int i = 0; i < 20; ++i) words[i] = nullptr;
  words[11] = reinterpret_cast<void*>(entry);
  fiber->stack_pointer = words;
#endif
  fiber->entered = false;
  fiber->fake_stack = nullptr;
  fiber->bottom = fiber->stack;
  fiber->bottom_bytes = fiber->stack_bytes;
}

Fiber* make_fiber(void (*entry)()) {
  Unobserved unobserved;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  auto* fiber = new Fiber;
  fiber->stack_bytes = (stack_bytes() + page - 1) / page * page;
  void* memory = mmap(nullptr, fiber->stack_bytes + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    delete fiber;
    fail("no memory for the stack of another CUDA thread (" + std::to_string(pool().all.size()) +
         " exist); launch fewer threads at once or lower BRAZE_EMULATOR_STACK_KB");
  }
  if (pool().all.size() < kMaxGuarded) mprotect(memory, page, PROT_NONE);
  fiber->stack = static_cast<char*>(memory) + page;
#if defined(__SANITIZE_ADDRESS__)
  // An earlier stack here may have left its red zones.
  __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);
#endif
  set_start(fiber, entry);
#if defined(BRAZE_EMULATOR_TSAN)
  fiber->tsan = __tsan_create_fiber(0);
#endif
  pool().all.push_back(fiber);
  return fiber;
}

}  // namespace

void set_fiber_stack_bytes(size_t bytes) {
  pool().stack_bytes = bytes;
  for (Fiber* fiber : pool().idle) {
    munmap(fiber->stack - sysconf(_SC_PAGESIZE), fiber->stack_bytes + sysconf(_SC_PAGESIZE));
    std::erase(pool().all, fiber);
#if defined(BRAZE_EMULATOR_TSAN)
    __tsan_destroy_fiber(fiber->tsan);
#endif
    delete fiber;
  }
  pool().idle.clear();
}

Fiber* acquire_fiber(void (*entry)()) {
  std::vector<Fiber*>& idle = pool().idle;
  if (idle.empty()) return make_fiber(entry);
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

void release_fiber(Fiber* fiber) { pool().idle.push_back(fiber); }

void abandon_fiber(Fiber* fiber) {
  // Not reused: TSan's call stack for it has frames that never end.
  std::erase(pool().all, fiber);
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  munmap(fiber->stack - page, fiber->stack_bytes + page);
#if defined(BRAZE_EMULATOR_TSAN)
  __tsan_destroy_fiber(fiber->tsan);
#endif
  delete fiber;
}

void prepare_fibers(size_t count, void (*entry)()) {
  while (pool().idle.size() < count) pool().idle.push_back(make_fiber(entry));
}

void bind_host_fiber([[maybe_unused]] Fiber* host) {
#if defined(BRAZE_EMULATOR_TSAN)
  host->tsan = __tsan_get_current_fiber();
#endif
}

void fiber_entered([[maybe_unused]] Fiber* self) {
  self->entered = true;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &previous->bottom, &previous->bottom_bytes);
#endif
}

void switch_fiber(Fiber* from, Fiber* to) {
  ++pool().switches;
  previous = from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->bottom_bytes);
#endif
#if defined(BRAZE_EMULATOR_TSAN)
  __tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);
#endif
  emulator_switch(&from->stack_pointer, to->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from->fake_stack, &previous->bottom, &previous->bottom_bytes);
#endif
}

bool in_guard_page(const void* address) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto* byte = static_cast<const char*>(address);
  for (const Fiber* fiber : pool().all) {
    if (byte >= fiber->stack - page && byte < fiber->stack) return true;
  }
  return false;
}

uint64_t switch_count() { return pool().switches; }

#if defined(BRAZE_EMULATOR_TSAN)
void release_order(void* object) { __tsan_release(object); }
void acquire_order(void* object) { __tsan_acquire(object); }
Unobserved::Unobserved() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Unobserved::~Unobserved() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
void release_order(void*) {}
void acquire_order(void*) {}
Unobserved::Unobserved() {}
Unobserved::~Unobserved() {}
#endif

}  // namespace emulator
