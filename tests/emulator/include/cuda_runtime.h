// CUDA's runtime header, for the emulator: the CUDA sources of csrc/cuda compile against it as
// plain C++.
#pragma once
#include "emulator/language.h"
// The order matters: each uses what stands above.
#include "emulator/runtime_api.h"
// clang-format off
#include "emulator/threads.h"
#include "emulator/memory.h"
#include "emulator/intrinsics.h"
#include "emulator/launch.h"
// clang-format on
