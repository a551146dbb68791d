#include "instruction_set.h"

#include <atomic>

namespace braze::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

int count_available() {
  int count = 1;
#if defined(__x86_64__) && !defined(BRAZE_BASELINE_ONLY)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    count = 2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      count = __builtin_cpu_supports("avx512bf16") ? 4 : 3;
    }
  }
#endif
  return count;
}

int available() {
  static const int count = count_available();
  return count;
}

std::atomic<int>& active() {
  static std::atomic<int> index{available() - 1};
  return index;
}

}  // namespace

std::vector<std::string> available_instruction_sets() { return {kNames, kNames + available()}; }

std::string instruction_set() { return kNames[active_instruction_set()]; }

bool set_instruction_set(const std::string& name) {
  for (int i = 0; i < available(); ++i) {
    if (name == kNames[i]) {
      active() = i;
      return true;
    }
  }
  return false;
}

int active_instruction_set() { return active().load(std::memory_order_relaxed); }

}  // namespace braze::cpu
