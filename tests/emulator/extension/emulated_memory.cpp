#include "emulated_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <mutex>
#include <unordered_set>
#include <utility>
#include <vector>

#include "emulator/control.h"

namespace emulated_memory {
namespace {

struct State {
  std::mutex mutex;
  bool installed = false, deferred = false, capturing = false;
  int graphs = 0;
  std::unordered_set<void*> of_graphs;
  std::vector<void*> until_run, until_destroyed;
};

// Never destroyed: tensors may outlive the module.
State& state() {
  static State* const instance = new State;
  return *instance;
}

void release(void* data) {
  if (data == nullptr) return;
  {
    State& s = state();
    const std::lock_guard lock(s.mutex);
    if (s.of_graphs.erase(data) != 0 && s.graphs > 0) {
      s.until_destroyed.push_back(data);
      return;
    }
    if (s.deferred && emulator::pending_work() > 0) {
      s.until_run.push_back(data);
      return;
    }
  }
  c10::GetDefaultCPUAllocator()->raw_deallocate(data);
}

void give_back(std::vector<void*>& kept) {
  std::vector<void*> blocks;
  {
    const std::lock_guard lock(state().mutex);
    blocks.swap(kept);
  }
  for (void* data : blocks) c10::GetDefaultCPUAllocator()->raw_deallocate(data);
}

// A block's context is its address, as in torch's own: oneDNN allocates without a DataPtr.
class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* const data = c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
    const std::lock_guard lock(state().mutex);
    if (state().capturing && data != nullptr) state().of_graphs.insert(data);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

void install() {
  if (std::exchange(state().installed, true)) return;
  c10::SetCPUAllocator(new KeepingAllocator, 255);
}

}  // namespace

void set_deferred(bool deferred) {
  install();
  state().deferred = deferred;
  if (!deferred) work_has_run();
}

void work_has_run() { give_back(state().until_run); }

void begin_capture() {
  install();
  state().capturing = true;
  ++state().graphs;
}

void end_capture() { state().capturing = false; }

void graph_destroyed() {
  if (--state().graphs == 0) give_back(state().until_destroyed);
}

}  // namespace emulated_memory
