#include "emulated_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulator/control.h"

namespace emulated_memory {
namespace {

struct Block {
  c10::DataPtr memory;
  bool of_graph;
};

struct State {
  std::mutex mutex;
  bool installed = false, deferred = false, capturing = false;
  int graphs = 0;
  std::unordered_map<void*, Block> blocks;  // in use, by address
  std::vector<Block> until_run, until_destroyed;
};

// Never destroyed: tensors may outlive the module.
State& state() {
  static State* const instance = new State;
  return *instance;
}

void release(void* address) {
  if (address == nullptr) return;
  State& s = state();
  const std::lock_guard lock(s.mutex);
  const auto found = s.blocks.find(address);
  if (found == s.blocks.end()) {  // older than this allocator, given back by its address alone
    c10::GetDefaultCPUAllocator()->raw_deleter()(address);
    return;
  }
  Block block = std::move(found->second);
  s.blocks.erase(found);
  if (block.of_graph && s.graphs > 0) {
    s.until_destroyed.push_back(std::move(block));
  } else if (s.deferred && emulator::pending_work() > 0) {
    s.until_run.push_back(std::move(block));
  }
}

class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr memory = c10::GetDefaultCPUAllocator()->allocate(bytes);
    void* const data = memory.get();
    if (data != nullptr) {
      State& s = state();
      const std::lock_guard lock(s.mutex);
      s.blocks.emplace(data, Block{std::move(memory), s.capturing});
    }
    // The address is the context: raw allocations keep nothing else.
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

void work_has_run() {
  std::vector<Block> blocks;
  const std::lock_guard lock(state().mutex);
  blocks.swap(state().until_run);
}

void begin_capture() {
  install();
  state().capturing = true;
  ++state().graphs;
}

void end_capture() { state().capturing = false; }

void graph_destroyed() {
  std::vector<Block> blocks;
  const std::lock_guard lock(state().mutex);
  if (--state().graphs == 0) blocks.swap(state().until_destroyed);
}

}  // namespace emulated_memory
