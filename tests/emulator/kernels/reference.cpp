// The CPU optimizers, baseline instruction set only: the others are compared with it elsewhere, and
// four sets take four times as long to compile.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "cpu/optimizer_cpu.h"
#include "cpu/threads.h"
#include "math/convert.h"
#include "plan/chunks.cpp"

#undef __x86_64__
#include "cpu/optimizer_cpu.cpp"

namespace braze::cpu {
int usable_threads(int) { return 1; }
int active_instruction_set() { return 0; }
}  // namespace braze::cpu
