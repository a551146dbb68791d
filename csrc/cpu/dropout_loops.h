// What each instruction set has for dropout.
#pragma once
#include "../plan/dropout.h"
#include "sets.h"

namespace braze::cpu {

// Elements [begin, end); begin is a multiple of kDropoutTile.
BRAZE_IN_SETS(void dropout_range(const DropoutArgs& args, int64_t begin, int64_t end);)
BRAZE_IN_BF16_SET(using avx512::dropout_range;)

constexpr int64_t kDropoutTile = 512;

}  // namespace braze::cpu
