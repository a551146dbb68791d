#include "new_like.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "device_backend.h"

namespace braze {
namespace {

constexpr size_t kLarge = size_t{1} << 20;
constexpr size_t kMostKept = size_t{512} << 20;

struct Block {
  void* data;
  size_t size;
};

// Blocks that no tensor uses now, the latest last.
struct Kept {
  std::atomic<bool> reuse{true};
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t total = 0;
};

// Never destroyed: tensors may outlive static objects.
Kept& kept() {
  static Kept* const instance = new Kept;
  return *instance;
}

// Takes the oldest blocks out of the store while `more` is true.
template <class More>
std::vector<Block> oldest(Kept& store, const More& more) {
  std::vector<Block> out;
  while (!store.blocks.empty() && more()) {
    out.push_back(store.blocks.front());
    store.total -= store.blocks.front().size;
    store.blocks.erase(store.blocks.begin());
  }
  return out;
}

void release(const std::vector<Block>& blocks) {
  for (const Block& block : blocks) c10::free_cpu(block.data);
}

void give_back(void* context) {
  const Block block = *static_cast<Block*>(context);
  delete static_cast<Block*>(context);
  std::vector<Block> unwanted;
  {
    Kept& store = kept();
    const std::lock_guard lock(store.mutex);
    store.blocks.push_back(block);
    store.total += block.size;
    unwanted = oldest(store, [&] { return !store.reuse || store.total > kMostKept; });
  }
  release(unwanted);
}

// A kept block of this size or up to an eighth more; else a new one in the place of as many kept
// ones, so that memory kept never adds to memory in use.
Block take(size_t size) {
  std::vector<Block> unwanted;
  {
    Kept& store = kept();
    const std::lock_guard lock(store.mutex);
    const auto fits = [&](const Block& b) { return b.size >= size && b.size <= size + size / 8; };
    const auto found = std::find_if(store.blocks.rbegin(), store.blocks.rend(), fits);
    if (found != store.blocks.rend()) {
      const Block block = *found;
      store.total -= block.size;
      store.blocks.erase(std::next(found).base());
      return block;
    }
    const size_t before = store.total;
    unwanted = oldest(store, [&] { return before - store.total < size; });
  }
  release(unwanted);
  return {c10::alloc_cpu(size), size};
}

class ReusingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, c10::Device(c10::kCPU)};
    auto* block = new Block(take(size));
    return {block->data, block, &give_back, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

c10::Allocator* allocator_of(const at::Tensor& like) {
  return like.is_cpu() ? c10::GetCPUAllocator() : device_place(like).backend->allocator();
}

c10::DispatchKeySet keys_of(const at::Tensor& like) {
  return c10::DispatchKeySet(like.options().computeDispatchKey());
}

at::Tensor make_like(const at::Tensor& like, c10::ScalarType dtype, c10::Allocator* allocator) {
  const c10::DeviceGuard guard(like.device());
  return at::detail::empty_strided_generic(
      like.sizes(),
      like.is_non_overlapping_and_dense() ? like.strides().vec()
                                          : at::infer_dense_strides(like.sizes(), like.strides()),
      allocator, keys_of(like), dtype);
}

}  // namespace

at::Tensor new_like(const at::Tensor& like) {
  static ReusingAllocator* const reusing = new ReusingAllocator;
  const bool reuses = like.is_cpu() && like.nbytes() > kLarge && kept().reuse;
  return make_like(like, like.scalar_type(), reuses ? reusing : allocator_of(like));
}

at::Tensor new_lasting(const at::Tensor& like, c10::ScalarType dtype) {
  return make_like(like, dtype, allocator_of(like));
}

at::Tensor new_array(const at::Tensor& like, at::IntArrayRef sizes, c10::ScalarType dtype,
                     c10::MemoryFormat format) {
  const c10::DeviceGuard guard(like.device());
  return at::detail::empty_generic(sizes, allocator_of(like), keys_of(like), dtype, format);
}

void set_memory_reuse(bool on) {
  kept().reuse = on;
  if (!on) empty_memory_cache();
}

bool memory_reuse() { return kept().reuse; }

size_t memory_kept() {
  const std::lock_guard lock(kept().mutex);
  return kept().total;
}

void empty_memory_cache() {
  std::vector<Block> unwanted;
  {
    const std::lock_guard lock(kept().mutex);
    unwanted = oldest(kept(), [] { return true; });
  }
  release(unwanted);
}

}  // namespace braze
