// Counts the memory requests of dropout's kernels.
#include "cuda/dropout_launch.h"
#include "memory.h"

void count_dropout() {
  using namespace braze;
  constexpr int64_t kElements = 12288;
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
    const size_t bytes = kElements * size_of(type.dtype);
    char *x = device_memory("x", bytes, type.phase),
         *second = device_memory("second", bytes, type.phase),
         *out = device_memory("out", bytes, type.phase);
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
      count(std::string("dropout_") + step.name + "_" + type.name,
            [&] { return cuda::dropout(args, nullptr); });
    }
  }
}
