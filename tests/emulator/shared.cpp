// Shared memory: heap cells of exactly the size asked for.
#include <cstdlib>

#include "scheduler.h"

#if defined(BRAZE_EMULATOR_MSAN)
#include <sanitizer/msan_interface.h>
#endif

namespace emulator {

// 0xff: NaN in every floating-point type, -1 in every integer.
void fill_poison(void* address, size_t bytes) {
  memset(address, 0xff, bytes);
#if defined(BRAZE_EMULATOR_MSAN)
  __msan_poison(address, bytes);
#endif
}

void mark_written([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(BRAZE_EMULATOR_MSAN)
  __msan_unpoison(address, bytes);
#endif
}

namespace {

void* take_cell(size_t bytes, size_t alignment) {
  std::vector<SharedCell>& spare = launch_now->spare_cells;
  for (size_t i = 0; i < spare.size(); ++i) {
    if (spare[i].bytes != bytes || reinterpret_cast<uintptr_t>(spare[i].address) % alignment != 0) {
      continue;
    }
    void* address = spare[i].address;
    spare.erase(spare.begin() + static_cast<std::ptrdiff_t>(i));
    return address;
  }
  void* address = nullptr;
  if (posix_memalign(&address, alignment < 16 ? 16 : alignment, bytes) != 0) {
    fail("no memory for a block's shared memory");
  }
  return address;
}

}  // namespace

void* shared_cell(const void* key, size_t bytes, size_t alignment) {
  if (launch_now == nullptr) fail("shared memory outside a kernel");
  Block& block = *block_now;
  for (const SharedCell& cell : block.cells) {
    if (cell.key == key) return cell.address;
  }
  Unobserved unobserved;
  block.static_bytes += bytes;
  if (block.static_bytes > kDefaultSharedBytes) {
    fail("the kernel has " + std::to_string(block.static_bytes) +
         " bytes of static shared memory; the limit is 49,152. Make it dynamic");
  }
  void* address = take_cell(bytes, alignment);
  fill_poison(address, bytes);
  block.cells.push_back({key, address, bytes});
  return address;
}

void* dynamic_shared() {
  if (launch_now == nullptr) fail("shared memory outside a kernel");
  return block_now->dynamic;
}

void recycle_cells(Block& block) {
  Unobserved unobserved;
  for (const SharedCell& cell : block.cells) launch_now->spare_cells.push_back(cell);
  block.cells.clear();
  block.static_bytes = 0;
}

void free_cells() {
  Unobserved unobserved;
  for (const SharedCell& cell : launch_now->spare_cells) free(cell.address);
  launch_now->spare_cells.clear();
}

}  // namespace emulator
