// The CPU optimizers, baseline instruction set only: the others are compared with it elsewhere, and
// three sets take three times as long to compile.
#define BRAZE_BASELINE_ONLY
#define BRAZE_SET baseline
#define BRAZE_LEVEL 0
#include "cpu/optimizer_cpu.cpp"
#include "cpu/sets/optimizer_loops.cpp"
#include "cpu/threads.h"
#include "plan/chunks.cpp"

namespace braze::cpu {
int usable_threads(int) { return 1; }
int active_instruction_set() { return 0; }
}  // namespace braze::cpu
