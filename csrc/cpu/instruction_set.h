// Which instruction set the CPU loops use. Results do not depend on the choice.
#pragma once
#include <string>
#include <vector>

#include "../plan/interface.h"

namespace braze::cpu {

// Compiled in and runnable here, slowest first.
BRAZE_API std::vector<std::string> available_instruction_sets();
BRAZE_API std::string instruction_set();
BRAZE_API bool set_instruction_set(const std::string& name);  // false: not available

// Index into the tables of loops, in the order of sets.h.
int active_instruction_set();

}  // namespace braze::cpu
