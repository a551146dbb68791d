// Memory counters: only in programs built with BRAZE_EMULATOR_HOOKS.
#pragma once

namespace emulator {

// Starts afresh, or stops.
void count_memory(bool count);

// A line per place in the program: "memory <name> <address in the program> global|shared read|write
// <bytes a lane> <requests> <lanes> <sectors, or bank turns>".
void print_memory_counts(const char* name);

}  // namespace emulator
