#include "emulated_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <memory>
#include <mutex>
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
  std::vector<std::unique_ptr<Block>> until_run, until_destroyed;
};

// Never destroyed: tensors may outlive the module.
State& state() {
  static State* const instance = new State;
  return *instance;
}

void release(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (block->of_graph && s.graphs > 0) {
    s.until_destroyed.push_back(std::move(block));
  } else if (s.deferred && emulator::pending_work() > 0) {
    s.until_run.push_back(std::move(block));
  }
}

class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto block =
        std::make_unique<Block>(Block{c10::GetDefaultCPUAllocator()->allocate(bytes), false});
    {
      const std::lock_guard lock(state().mutex);
      block->of_graph = state().capturing;
    }
    void* const data = block->memory.get();
    return {data, block.release(), &release, c10::Device(c10::DeviceType::CPU)};
  }
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
  std::vector<std::unique_ptr<Block>> blocks;
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
  std::vector<std::unique_ptr<Block>> blocks;
  const std::lock_guard lock(state().mutex);
  if (--state().graphs == 0) blocks.swap(state().until_destroyed);
}

}  // namespace emulated_memory
