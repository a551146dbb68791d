// Dropout on the CPU, with at most `threads` threads. The bits of the result depend neither on
// their number nor on the instruction set.
#pragma once
#include "../plan/dropout.h"
#include "../plan/interface.h"

namespace braze::cpu {

BRAZE_API void dropout(const DropoutArgs& args, int threads);

}  // namespace braze::cpu
