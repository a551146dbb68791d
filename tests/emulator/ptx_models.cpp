// Asynchronous copies of each thread, until they are waited for.
#include "emulator/ptx_models.h"

#include <deque>
#include <unordered_map>

#include "scheduler.h"

namespace emulator {
namespace {

struct Copy {
  void* to;
  const void* from;
};
struct Copies {
  std::deque<std::deque<Copy>> groups;  // the last is open
};

// By block, then by thread.
std::unordered_map<const Thread*, Copies>& all_copies() {
  static auto* const instance = new std::unordered_map<const Thread*, Copies>;
  return *instance;
}

Copies& copies_of_caller() {
  if (launch_now == nullptr) fail("cp.async outside a kernel");
  static const char key = 0;
  // Filled with 0xff when a block starts: what an earlier one left under way is not ours.
  auto* started = static_cast<unsigned char*>(shared_cell(&key, 1, 1));
  if (*started != 0) {
    for (const Thread& thread : block_now->threads) all_copies().erase(&thread);
    *started = 0;
  }
  Copies& copies = all_copies()[thread_now];
  if (copies.groups.empty()) copies.groups.emplace_back();
  return copies;
}

}  // namespace

void async_copy(void* to, const void* from) {
  Unobserved unobserved;
  copies_of_caller().groups.back().push_back({to, from});
}

void async_copy_commit() {
  Unobserved unobserved;
  copies_of_caller().groups.emplace_back();
}

bool async_copy_landing(int pending, void** to, const void** from) {
  Unobserved unobserved;
  auto& groups = copies_of_caller().groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    if (groups.front().empty()) {
      groups.pop_front();
      continue;
    }
    give(to, groups.front().front().to);
    give(from, groups.front().front().from);
    groups.front().pop_front();
    return true;
  }
  return false;
}

}  // namespace emulator
