#include "threads.h"

#include <pthread.h>

#include <atomic>

namespace braze::cpu {
namespace {

std::atomic<bool> ran_parallel{false};
std::atomic<bool> pool_lost{false};

void in_forked_child() {
  if (ran_parallel) pool_lost = true;
}

}  // namespace

int usable_threads(int requested) {
  static const int registered = pthread_atfork(nullptr, nullptr, in_forked_child);
  if (requested <= 1 || registered != 0 || pool_lost.load(std::memory_order_relaxed)) return 1;
  ran_parallel.store(true, std::memory_order_relaxed);
  return requested;
}

}  // namespace braze::cpu
