// Counts the memory requests of dropout's kernels.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/dropout_launch.h"
#include "emulator/control.h"
#include "emulator/hooks.h"

namespace {

using namespace braze;

constexpr int64_t kElements = 12288;

char* device_memory(size_t phase) {
  void* memory = nullptr;
  const size_t bytes = kElements * 8 + phase;
  if (cudaMalloc(&memory, bytes) != cudaSuccess) abort();
  memset(memory, 0, bytes);
  return static_cast<char*>(memory) + phase;
}

void count(const std::string& name, const DropoutArgs& args) {
  emulator::count_memory(true);
  const cudaError_t error = cuda::dropout(args, nullptr);
  emulator::count_memory(false);
  if (error != cudaSuccess) {
    printf("%s: %s\n", name.c_str(), cudaGetErrorString(error));
    exit(1);
  }
  emulator::print_memory_counts(name.c_str());
}

}  // namespace

int main() {
  const struct {
    const char* name;
    DType dtype;
    size_t phase;  // bytes
  } types[] = {{"f32", DType::f32, 0},          {"f64", DType::f64, 0},
               {"bf16", DType::bf16, 0},        {"f16", DType::f16, 0},
               {"f32_off_by_1", DType::f32, 4}, {"bf16_off_by_1", DType::bf16, 2}};
  const struct {
    const char* name;
    DropoutStep step;
    DropoutMask mask;
  } steps[] = {{"scale", DropoutStep::scale, {}},
               {"add", DropoutStep::add, {}},
               {"activate", DropoutStep::activate, {}},
               {"activate_grad", DropoutStep::activate_grad, {}},
               {"rows", DropoutStep::scale, {DropoutMask::row, 3, 4096}},
               {"channels_last", DropoutStep::scale, {DropoutMask::channels_last, 3, 4096}}};
  for (const auto& type : types) {
    char *x = device_memory(type.phase), *second = device_memory(type.phase),
         *out = device_memory(type.phase);
    for (const auto& step : steps) {
      DropoutArgs args;
      args.step = step.step;
      args.mask = step.mask;
      args.dtype = type.dtype;
      args.numel = kElements;
      args.x = x;
      const bool two = step.step == DropoutStep::add || step.step == DropoutStep::activate_grad;
      args.second = two ? second : nullptr;
      args.out = out;
      args.threshold = 32768;
      args.terms = dropout_terms(args.threshold);
      count(std::string(step.name) + "_" + type.name, args);
    }
  }
  return 0;
}
