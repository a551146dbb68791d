// A stack overflow of a CUDA thread ends the process with a message, not only a signal.
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>

#include "fiber.h"
#include "internal.h"

namespace emulator {

#if defined(__SANITIZE_ADDRESS__) || defined(BRAZE_EMULATOR_TSAN) || defined(BRAZE_EMULATOR_MSAN)
// The sanitizers have handlers of their own.
void watch_stacks() {}
#else
namespace {

struct sigaction before;

void on_fault(int number, siginfo_t* info, void*) {
  if (in_guard_page(info->si_addr)) {
    constexpr char kMessage[] =
        "emulator: a CUDA thread overflowed its stack. Use less of it, or raise "
        "BRAZE_EMULATOR_STACK_KB (default 64)\n";
    [[maybe_unused]] const auto written = write(2, kMessage, sizeof(kMessage) - 1);
  }
  // The access is repeated, under whatever handler was there first.
  sigaction(number, &before, nullptr);
}

}  // namespace

void watch_stacks() {
  static const bool installed = [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return sigaction(SIGSEGV, &action, &before) == 0;
  }();
  // The handler cannot run on the stack that overflowed.
  thread_local const bool has_stack = [] {
    stack_t present = {};
    if (sigaltstack(nullptr, &present) == 0 && !(present.ss_flags & SS_DISABLE)) return true;
    constexpr size_t kBytes = 64 * 1024;
    stack_t own = {};
    own.ss_sp = malloc(kBytes);
    own.ss_size = kBytes;
    return sigaltstack(&own, nullptr) == 0;
  }();
  (void)installed;
  (void)has_stack;
}
#endif

}  // namespace emulator
