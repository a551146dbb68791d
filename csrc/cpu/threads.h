// How many threads a parallel region may use.
#pragma once
#include "../plan/interface.h"

namespace braze::cpu {

// `requested`, or 1 in a process forked from one that had already run a parallel region here: the
// OpenMP pool does not survive a fork, and a region in the child would wait for threads that are
// gone.
BRAZE_API int usable_threads(int requested);

}  // namespace braze::cpu
