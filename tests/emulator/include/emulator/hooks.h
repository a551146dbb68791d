// Memory counters: only in programs built with BRAZE_EMULATOR_HOOKS.
#pragma once
#include <cstddef>

namespace emulator {

// Starts afresh, or stops.
void count_memory(bool count);

// What device memory from `begin` on is called, until it gets another name.
void name_memory(const char* name, const void* begin, size_t bytes);

// A line per buffer and kind of access: "memory <name> <buffer> read|write <bytes a lane>
// <requests> <lanes> <sectors, or bank turns>". Buffers without a name are "unnamed" or "shared".
void print_memory_counts(const char* name);

// Accesses while it lives do not count: those of a model beyond the instruction's own.
struct Uncounted {
#if defined(BRAZE_EMULATOR_HOOKS)
  Uncounted();
  ~Uncounted();
  Uncounted(const Uncounted&) = delete;
#endif
};

}  // namespace emulator
