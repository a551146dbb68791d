// Runs the CPU kernels of one instruction set under callgrind, which counts what measured() does.
//   cpu_kernels SET   lines "kernel dtype elements", one for each call of measured(), in its order
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cpu/batch_norm_cpu.h"
#include "cpu/dropout_cpu.h"
#include "cpu/instruction_set.h"
#include "cpu/optimizer_cpu.h"

using namespace braze;

using Call = std::function<void()>;

extern "C" __attribute__((noinline)) void measured(const Call& call) { call(); }

namespace {

constexpr int64_t kElements = 32768;
constexpr int64_t kChannels = 64, kSpatial = 256;

// Never freed. Every value is in [1, 2), or, with signs, in (-2, -1] as well.
void* memory(int64_t elements, DType dtype, bool signs = false) {
  static uint32_t random = 1;
  const size_t size = dtype == DType::f32 ? 4 : 2;
  const size_t bytes = (static_cast<size_t>(elements) * size + 63) / 64 * 64;
  char* data = static_cast<char*>(std::aligned_alloc(64, bytes));
  for (size_t i = 0; i < bytes / size; ++i) {
    random = random * 1664525u + 1013904223u;
    const uint32_t fraction = (random >> 8) & 0x7fffffu, sign = signs ? random >> 31 : 0;
    const uint32_t wide = sign << 31 | 0x3f800000u | fraction;
    const uint32_t half = sign << 15 | 0x3c00u | fraction >> 13;
    const uint32_t bits = dtype == DType::f32 ? wide : dtype == DType::bf16 ? wide >> 16 : half;
    std::memcpy(data + i * size, &bits, size);  // the low bytes
  }
  return data;
}

template <class Rule>
Call optimizer(const typename Rule::Options& options, int states, int64_t n, DType dtype,
               DType state_dtype) {
  TensorWork work;
  work.numel = n;
  work.param = {memory(n, dtype), nullptr, dtype};
  work.grad = {memory(n, dtype, true), nullptr, dtype};
  for (int k = 0; k < states; ++k) work.state[k] = {memory(n, state_dtype), nullptr, state_dtype};
  const std::vector<TensorWork> tensors{work};
  ChunkList chunks;
  chunks.build(tensors);
  const std::vector<Hyper<Rule>> hypers{make_hyper<Rule>(options, {.step = 10})};
  return [=] { cpu::update_tensors(tensors, chunks, view_of(hypers), 1); };
}

Call adam(int64_t n, DType dtype, DType state_dtype) {
  const Adam::Options options{1e-3, 0.9, 0.999, 1e-8, 0, 0, 1, false, false};
  return optimizer<Adam>(options, 2, n, dtype, state_dtype);
}

Call sgd(int64_t n, DType dtype, DType state_dtype) {
  return optimizer<Sgd>({1e-3, 0, 0, 0.9, 0, 1, false}, 1, n, dtype, state_dtype);
}

// What the gate is for: SGD with momentum that the compiler was kept from vectorising.
__attribute__((noinline, optimize("no-tree-vectorize"))) void scalar_sgd_loop(float* p,
                                                                              const float* g,
                                                                              float* buffer,
                                                                              int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = 0.9f * buffer[i] + g[i];
    p[i] -= 1e-3f * buffer[i];
  }
}

Call scalar_sgd(int64_t n) {
  float* const p = static_cast<float*>(memory(n, DType::f32));
  float* const buffer = static_cast<float*>(memory(n, DType::f32));
  const float* const g = static_cast<float*>(memory(n, DType::f32, true));
  return [=] { scalar_sgd_loop(p, g, buffer, n); };
}

Call dropout(DropoutStep step, int64_t n, DType dtype) {
  DropoutArgs args;
  args.step = step;
  args.dtype = dtype;
  args.numel = n;
  args.x = memory(n, dtype, true);
  args.second = memory(n, dtype, true);
  args.out = memory(n, dtype);
  args.threshold = dropout_threshold(0.5);
  args.terms = dropout_terms(args.threshold);
  return [=] { cpu::dropout(args, 1); };
}

// One layer in training, as csrc/ops has it run.
struct Layer {
  ActivationShape shape;
  void* workspace;
  StatisticsArgs statistics;
  ApplyArgs apply;
  BackwardArgs backward;

  // With `join`: relu(bn(x) + residual), of which a mask is kept.
  Layer(int64_t n, DType dtype, bool channels_last, bool join)
      : shape{n / (kChannels * kSpatial), kChannels, kSpatial, channels_last, dtype} {
    const auto channels = [](int64_t rows = 1) { return memory(rows * kChannels, DType::f32); };
    workspace = std::aligned_alloc(64, (cpu::batch_norm_workspace(shape) + 63) / 64 * 64);
    statistics.shape = apply.shape = backward.shape = shape;
    statistics.x = memory(n, dtype, true);
    statistics.channels.weight = channels();
    statistics.channels.bias = channels();
    statistics.channels.running_mean = channels();
    statistics.channels.running_var = channels();
    statistics.stats = channels(kStatsRows);
    apply.input[0] = backward.input[0] = {statistics.x, statistics.stats};
    apply.activation = backward.activation = Activation::relu;
    apply.y = memory(n, dtype);
    backward.dy = memory(n, dtype, true);
    backward.count = static_cast<double>(shape.per_channel());
    backward.grad[0] = {DType::f32, channels(), channels(), channels(kCoefficientRows),
                        memory(n, dtype)};
    if (!join) return;
    apply.residual = memory(n, dtype, true);
    apply.mask = static_cast<uint8_t*>(memory(shape.mask_bytes(), DType::bf16));
    backward.mask = apply.mask;
    backward.grad_residual = memory(n, dtype);
  }
};

// Once before, for what a process does once: only the kernel itself is left.
void run(const std::string& name, const std::function<Call(int64_t)>& make) {
  for (const int64_t n : {kElements, 2 * kElements}) {
    const Call call = make(n);
    call();
    measured(call);
    std::printf("%s %lld\n", name.c_str(), static_cast<long long>(n));
  }
}

void run_batch_norm(const std::string& dtype_name, DType dtype, bool channels_last, bool join) {
  const std::string order = channels_last ? "NHWC" : "NCHW";
  const auto run_step = [&](const std::string& step, auto function) {
    run(step + "_" + order + " " + dtype_name, [=](int64_t n) -> Call {
      const Layer layer(n, dtype, channels_last, join);
      cpu::statistics(layer.statistics, layer.workspace, 1);
      cpu::apply(layer.apply, 1);
      cpu::reduce(layer.backward, layer.workspace, 1);
      return [=] { function(layer); };
    });
  };
  const std::string act = join ? "join" : "relu";
  if (channels_last != join) {
    run_step("statistics", [](const Layer& l) { cpu::statistics(l.statistics, l.workspace, 1); });
  }
  run_step("apply_" + act, [](const Layer& l) { cpu::apply(l.apply, 1); });
  run_step("reduce_" + act, [](const Layer& l) { cpu::reduce(l.backward, l.workspace, 1); });
  run_step("apply_grad_" + act, [](const Layer& l) { cpu::apply_grad(l.backward, 1); });
  run_step("backward_" + act, [](const Layer& l) { cpu::backward(l.backward, l.workspace, 1); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !cpu::set_instruction_set(argv[1])) return 2;
  const struct {
    const char* name;
    DType dtype;
  } dtypes[] = {{"fp32", DType::f32}, {"bf16", DType::bf16}, {"fp16", DType::f16}};
  for (const auto& [name, dtype] : dtypes) {
    const std::string suffix = std::string(" ") + name;
    run("adam" + suffix, [&](int64_t n) { return adam(n, dtype, dtype); });
    run("sgd" + suffix, [&](int64_t n) { return sgd(n, dtype, dtype); });
    run("dropout_scale" + suffix, [&](int64_t n) { return dropout(DropoutStep::scale, n, dtype); });
    run("dropout_add" + suffix, [&](int64_t n) { return dropout(DropoutStep::add, n, dtype); });
    run_batch_norm(name, dtype, true, false);
    run_batch_norm(name, dtype, true, true);
    run_batch_norm(name, dtype, false, true);
  }
  run("adam bf16,fp32_states", [](int64_t n) { return adam(n, DType::bf16, DType::f32); });
  run("sgd bf16,fp32_states", [](int64_t n) { return sgd(n, DType::bf16, DType::f32); });
  run("scalar_sgd fp32", [](int64_t n) { return scalar_sgd(n); });
}
