// Counts what each warp's memory requests cost. Sources under test are compiled with
// -fsanitize=thread, but the functions it calls are these and not TSan's.
#if defined(BRAZE_EMULATOR_HOOKS)
#include "emulator/hooks.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>

#include "scheduler.h"
#include "stream.h"

namespace emulator {
namespace {

// What is accessed, and how.
struct Access {
  std::string buffer;
  bool write;
  uint8_t bytes;
  bool operator<(const Access& o) const {
    return std::tie(buffer, write, bytes) < std::tie(o.buffer, o.write, o.bytes);
  }
};

const char* const kShared = "shared";

struct Named {
  const char* end;
  std::string name;
};

std::map<const char*, Named>& buffers() {
  static auto* const instance = new std::map<const char*, Named>;
  return *instance;
}

std::string buffer_of(const void* address) {
  const auto* byte = static_cast<const char*>(address);
  const auto after = buffers().upper_bound(byte);
  if (after == buffers().begin()) return "unnamed";
  const Named& found = std::prev(after)->second;
  return byte < found.end ? found.name : "unnamed";
}

// One instruction of a warp: the lanes' n-th visits of a place.
struct RequestKey {
  uint64_t block;
  unsigned warp, visit;
  bool operator<(const RequestKey& o) const {
    return std::tie(block, warp, visit) < std::tie(o.block, o.warp, o.visit);
  }
};

// A place in the program that makes such accesses.
struct PerPlace {
  std::map<RequestKey, std::vector<uintptr_t>> requests;
  std::map<std::pair<uint64_t, unsigned>, unsigned> visits;  // by block and thread
};

std::map<std::pair<Access, uintptr_t>, PerPlace>& places() {
  static auto* const instance = new std::map<std::pair<Access, uintptr_t>, PerPlace>;
  return *instance;
}

bool counting = false;
bool busy = false;

bool within(const void* address, const void* begin, size_t bytes) {
  const auto* byte = static_cast<const char*>(address);
  const auto* first = static_cast<const char*>(begin);
  return byte >= first && byte < first + bytes;
}

bool is_shared(const void* address) {
  for (const SharedCell& cell : block_now->cells) {
    if (within(address, cell.address, cell.bytes)) return true;
  }
  return block_now->dynamic != nullptr &&
         within(address, block_now->dynamic, launch_now->config->shared_bytes);
}

// 32-byte sectors that a request touches.
int sectors(const std::vector<uintptr_t>& addresses, int bytes) {
  std::set<uintptr_t> touched;
  for (const uintptr_t address : addresses) {
    for (uintptr_t s = address / 32; s <= (address + static_cast<unsigned>(bytes) - 1) / 32; ++s) {
      touched.insert(s);
    }
  }
  return static_cast<int>(touched.size());
}

// Turns that 32 banks of 4 bytes need. Accesses of 8 and 16 bytes go in halves and quarters of a
// warp; lanes that want the same word share it.
int bank_turns(const std::vector<uintptr_t>& addresses, int bytes) {
  const size_t lanes = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  int turns = 0;
  for (size_t begin = 0; begin < addresses.size(); begin += lanes) {
    std::set<uintptr_t> words[32];
    size_t most = 0;
    for (size_t i = begin; i < std::min(begin + lanes, addresses.size()); ++i) {
      for (int b = 0; b < bytes; b += 4) {
        const uintptr_t word = (addresses[i] + static_cast<unsigned>(b)) / 4;
        words[word % 32].insert(word);
        most = std::max(most, words[word % 32].size());
      }
    }
    turns += static_cast<int>(most);
  }
  return turns;
}

}  // namespace

// Launch arguments, local variables and what the host reads do not count.
void observe(const void* address, int bytes, bool write, const void* pc) {
  if (!counting || busy || launch_now == nullptr || thread_now == nullptr) return;
  busy = true;
  const bool shared = is_shared(address);
  if (shared || memory_kind(address) == MemoryKind::device) {
    const uint3 index = block_now->index;
    const uint64_t block =
        index.x + static_cast<uint64_t>(gridDim.x) * (index.y + gridDim.y * index.z);
    const Access access = {shared ? kShared : buffer_of(address), write,
                           static_cast<uint8_t>(bytes)};
    PerPlace& own = places()[{access, reinterpret_cast<uintptr_t>(pc)}];
    const unsigned visit = own.visits[{block, thread_now->number}]++;
    own.requests[{block, thread_now->number / 32, visit}].push_back(
        reinterpret_cast<uintptr_t>(address));
  }
  busy = false;
}

void count_memory(bool count) {
  if (count) places().clear();
  counting = count;
}

Uncounted::Uncounted() { busy = true; }
Uncounted::~Uncounted() { busy = false; }

void name_memory(const char* name, const void* begin, size_t bytes) {
  const auto* first = static_cast<const char*>(begin);
  buffers()[first] = {first + bytes, name};
}

void print_memory_counts(const char* name) {
  struct Sums {
    size_t requests = 0, lanes = 0;
    int cost = 0;
  };
  std::map<Access, Sums> totals;
  for (const auto& [place, own] : places()) {
    const Access& access = place.first;
    Sums& total = totals[access];
    total.requests += own.requests.size();
    for (const auto& [key, addresses] : own.requests) {
      total.lanes += addresses.size();
      total.cost += access.buffer == kShared ? bank_turns(addresses, access.bytes)
                                             : sectors(addresses, access.bytes);
    }
  }
  for (const auto& [access, total] : totals) {
    printf("memory %s %s %s %d %zu %zu %d\n", name, access.buffer.c_str(),
           access.write ? "write" : "read", access.bytes, total.requests, total.lanes, total.cost);
  }
}

}  // namespace emulator

#define HOOK(name, bytes, write)                                           \
  void name(void* address) {                                               \
    emulator::observe(address, bytes, write, __builtin_return_address(0)); \
  }
#define HOOKS(bytes)                               \
  HOOK(__tsan_read##bytes, bytes, false)           \
  HOOK(__tsan_write##bytes, bytes, true)           \
  HOOK(__tsan_unaligned_read##bytes, bytes, false) \
  HOOK(__tsan_unaligned_write##bytes, bytes, true)
#define ATOMIC(bits, T)                                                                        \
  T __tsan_atomic##bits##_load(const volatile T* address, int) {                               \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                         \
  }                                                                                            \
  void __tsan_atomic##bits##_store(volatile T* address, T value, int) {                        \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                        \
  }                                                                                            \
  T __tsan_atomic##bits##_fetch_add(volatile T* address, T value, int) {                       \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                               \
  }                                                                                            \
  T __tsan_atomic##bits##_fetch_sub(volatile T* address, T value, int) {                       \
    return __atomic_fetch_sub(address, value, __ATOMIC_SEQ_CST);                               \
  }                                                                                            \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* address, T* expected, T value, \
                                                    int, int) {                                \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST,      \
                                       __ATOMIC_SEQ_CST);                                      \
  }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
// Copies of whole structs are local or of launch arguments.
void __tsan_read_range(void*, size_t) {}
void __tsan_write_range(void*, size_t) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
ATOMIC(8, uint8_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
}
#endif
