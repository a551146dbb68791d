// Runs the CPU kernels of one instruction set: under callgrind, which counts what measured() does,
// or for the bits of their results.
//   cpu_kernels            lists the sets
//   cpu_kernels SET        lines "kernel dtype elements", one for each call of measured(), in its
//                          order
//   cpu_kernels SET BITS   more kernels, lines "kernel dtype elements hash": of all their memory,
//                          with BITS flipped in the last byte
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cpu/batch_norm_cpu.h"
#include "cpu/checksum_cpu.h"
#include "cpu/dropout_cpu.h"
#include "cpu/instruction_set.h"
#include "cpu/optimizer_cpu.h"

using namespace braze;

using Call = std::function<void()>;

extern "C" __attribute__((noinline)) void measured(const Call& call) { call(); }

namespace {

constexpr int64_t kElements = 32768;
constexpr int64_t kChannels = 64, kSpatial = 256;

// What memory() gave since it was last cleared.
std::vector<std::pair<char*, size_t>> given;
bool many_exponents = false;

// Never freed. Every value is in [0.9, 2), or, with many exponents, below that, down to
// where fp16 has denormals, or, with signs, minus that as well.
void* memory(int64_t elements, DType dtype, bool signs = false) {
  static uint32_t random = 1;
  return with_dtype(dtype, [&](auto number) -> void* {
    using S = decltype(number);
    const size_t bytes = (static_cast<size_t>(elements) * sizeof(S) + 63) / 64 * 64;
    S* data = static_cast<S*>(std::aligned_alloc(64, bytes));
    for (size_t i = 0; i < bytes / sizeof(S); ++i) {
      random = random * 1664525u + 1013904223u;
      const uint32_t fraction = (random >> 8) & 0x7fffffu, sign = signs ? random >> 31 : 0;
      const uint32_t exponent = 127 - (many_exponents ? random * 0x9e3779b9u >> 28 : 0);
      const float value = float_from_bits(sign << 31 | exponent << 23 | fraction);
      if constexpr (sizeof(S) == 8) {
        data[i] = 0.9 * value;  // a longer fraction
      } else {
        to_storage(value, data[i]);
      }
    }
    given.emplace_back(reinterpret_cast<char*>(data), bytes);
    return data;
  });
}

template <class Rule>
Call optimizer(const typename Rule::Options& options, int64_t n, DType dtype, DType state_dtype,
               bool accumulated = false) {
  TensorWork work;
  work.numel = n;
  work.param = {memory(n, dtype), nullptr, dtype};
  work.grad = {memory(n, dtype, true), nullptr, dtype};
  const std::vector<Hyper<Rule>> hypers{make_hyper<Rule>(options, {.step = 10})};
  for (int k = 0; k < Rule::kStates; ++k) {
    if (!Rule::uses(hypers[0].flags, k)) continue;
    work.state[k] = {memory(n, state_dtype), nullptr, state_dtype};
  }
  if (accumulated) work.sum = {memory(n, state_dtype, true), nullptr, state_dtype};
  work.is_double = dtype == DType::f64;
  const std::vector<TensorWork> tensors{work};
  ChunkList chunks;
  chunks.build(tensors);
  return [=] { cpu::update_tensors(tensors, chunks, view_of(hypers), 1); };
}

Call adam(int64_t n, DType dtype, DType state_dtype) {
  const Adam::Options options{1e-3, 0.9, 0.999, 1e-8, 0, 0, 1, false, false};
  return optimizer<Adam>(options, n, dtype, state_dtype);
}

Call sgd(int64_t n, DType dtype, DType state_dtype) {
  return optimizer<Sgd>({1e-3, 0, 0, 0.9, 0, 1, false}, n, dtype, state_dtype);
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

Call dropout(DropoutStep step, int64_t n, DType dtype, Activation act = Activation::identity,
             const DropoutMask& mask = {}) {
  DropoutArgs args;
  args.step = step;
  args.dtype = dtype;
  args.numel = n;
  args.x = memory(n, dtype, true);
  args.second = memory(n, dtype, true);
  args.out = memory(n, dtype);
  args.threshold = dropout_threshold(0.5);
  args.terms = dropout_terms(args.threshold);
  args.activation = act;
  args.parameter = 0.1;
  args.mask = mask;
  return [=] { cpu::dropout(args, 1); };
}

// What y is: activation(z), activation(z + residual), of whose derivative a mask is kept where it
// is one of two, or activation(z + z2).
enum class Join { none, residual, input };

// One layer in training, as csrc/ops has it run.
struct Layer {
  ActivationShape shape;
  void* workspace;
  StatisticsArgs statistics;
  ApplyArgs apply;
  BackwardArgs backward;

  Layer(const ActivationShape& of, Activation act, Join join) : shape(of) {
    const DType dtype = shape.dtype, narrow = dtype == DType::f64 ? dtype : DType::f32;
    const int64_t n = shape.numel();
    const auto channels = [&](int64_t rows = 1) { return memory(rows * shape.c, narrow); };
    workspace = std::aligned_alloc(64, (cpu::batch_norm_workspace(shape) + 63) / 64 * 64);
    statistics.shape = apply.shape = backward.shape = shape;
    statistics.x = memory(n, dtype, true);
    statistics.channels.param_dtype = statistics.channels.running_dtype = narrow;
    statistics.channels.weight = channels();
    statistics.channels.bias = channels();
    statistics.channels.running_mean = channels();
    statistics.channels.running_var = channels();
    statistics.stats = channels(kStatsRows);
    apply.input[0] = backward.input[0] = {statistics.x, statistics.stats};
    apply.activation = backward.activation = act;
    apply.parameter = backward.parameter = 0.1;
    apply.y = memory(n, dtype);
    backward.dy = memory(n, dtype, true);
    backward.count = static_cast<double>(shape.per_channel());
    const auto gradient = [&]() -> InputGradient {
      return {narrow, channels(), channels(), channels(kCoefficientRows), memory(n, dtype)};
    };
    backward.grad[0] = gradient();
    if (join == Join::residual) {
      apply.residual = memory(n, dtype, true);
      if (has_two_slopes(act)) {
        apply.mask = static_cast<uint8_t*>(memory(shape.mask_bytes(), DType::bf16));
      }
      backward.mask = apply.mask;
      backward.residual = apply.residual;
      backward.grad_residual = memory(n, dtype);
    } else if (join == Join::input) {
      apply.input[1] = backward.input[1] = {memory(n, dtype, true), channels(kStatsRows)};
      backward.grad[1] = gradient();
    }
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
      const ActivationShape shape{n / (kChannels * kSpatial), kChannels, kSpatial, channels_last,
                                  dtype};
      const Layer layer(shape, Activation::relu, join ? Join::residual : Join::none);
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

uint8_t flipped = 0;

uint64_t hash_of_given() {
  uint64_t hash = 0;
  for (const auto& [data, bytes] : given) {
    hash = cpu::mix(hash, cpu::checksum(data, static_cast<int64_t>(bytes), 1));
  }
  return hash;
}

// Of a call that must write something. Memory that it has of before `given` was cleared is not
// hashed.
void print_bits(const std::string& name, DType dtype, int64_t n, const Call& call) {
  constexpr const char* kNames[] = {"fp32", "fp64", "bf16", "fp16"};
  const uint64_t before = hash_of_given();
  call();
  if (hash_of_given() == before) std::abort();
  const auto [data, bytes] = given.back();
  data[bytes - 1] ^= static_cast<char>(flipped);
  std::printf("%s %s %lld %016llx\n", name.c_str(), kNames[static_cast<int>(dtype)],
              static_cast<long long>(n), static_cast<unsigned long long>(hash_of_given()));
  data[bytes - 1] ^= static_cast<char>(flipped);
}

// Sizes with and without a rest, in one vector and in several chunks.
constexpr int64_t kSizes[] = {3, 64, 1037, 40001};

template <class Rule>
void optimizer_bits(const std::vector<typename Rule::Options>& variants) {
  const DType dtypes[][2] = {{DType::f32, DType::f32},   {DType::bf16, DType::f32},
                             {DType::f16, DType::f32},   {DType::f64, DType::f64},
                             {DType::bf16, DType::bf16}, {DType::f16, DType::f16}};
  for (const auto& [dtype, state_dtype] : dtypes) {
    for (size_t v = 0; v < variants.size(); ++v) {
      for (const bool accumulated : {false, true}) {
        if (accumulated && (!Rule::kUpdatesParam || dtype == DType::f32)) continue;
        const std::string name = std::string(Rule::kName) + std::to_string(v) +
                                 (state_dtype == dtype ? "" : ",fp32_states") +
                                 (accumulated ? ",accumulated" : "");
        for (const int64_t n : kSizes) {
          given.clear();
          const Call call = optimizer<Rule>(variants[v], n, dtype, state_dtype, accumulated);
          print_bits(name, dtype, n, call);
        }
      }
    }
  }
}

void dropout_bits(DType dtype, const std::vector<Activation>& activations) {
  const auto all = [&](const char* name, DropoutStep step, Activation act) {
    for (const DropoutMask& mask : {DropoutMask{}, DropoutMask{DropoutMask::row, 5, 7},
                                    DropoutMask{DropoutMask::channels_last, 5, 7}}) {
      for (const int64_t n : kSizes) {
        given.clear();
        print_bits("dropout_" + std::string(name) + std::to_string(mask.kind) + "_" +
                       kActivationNames[static_cast<int>(act)],
                   dtype, n, dropout(step, n, dtype, act, mask));
      }
    }
  };
  all("scale", DropoutStep::scale, Activation::identity);
  all("add", DropoutStep::add, Activation::identity);
  for (const Activation act : activations) {
    all("activate", DropoutStep::activate, act);
    all("activate_grad", DropoutStep::activate_grad, act);
  }
}

void batch_norm_bits(const ActivationShape& shape, Activation act, Join join) {
  constexpr const char* kJoins[] = {"", "_residual", "_input"};
  const std::string suffix =
      std::string("_") + kActivationNames[static_cast<int>(act)] + kJoins[static_cast<int>(join)] +
      (shape.channels_last ? "_NHWC" : "_NCHW") + std::to_string(shape.spatial);
  given.clear();
  Layer layer(shape, act, join);
  const auto step = [&](const char* name, const Call& call) {
    print_bits(name + suffix, shape.dtype, shape.numel(), call);
  };
  void* const workspace = layer.workspace;
  const int64_t c = shape.c;
  const DType narrow = layer.statistics.channels.param_dtype;
  BackwardArgs& backward = layer.backward;
  step("from_running",
       [&] { cpu::from_running({shape, layer.statistics.channels, layer.statistics.stats}); });
  step("statistics", [&] { cpu::statistics(layer.statistics, workspace, 1); });
  step("apply", [&] { cpu::apply(layer.apply, 1); });
  step("reduce", [&] { cpu::reduce(backward, workspace, 1); });
  step("apply_grad", [&] { cpu::apply_grad(backward, 1); });
  backward.dy2 = memory(shape.numel(), shape.dtype, true);
  step("backward", [&] { cpu::backward(backward, workspace, 1); });
  // What several processes do.
  StatisticsArgs moments = layer.statistics;
  moments.moments = memory(kMomentsRows * c, narrow);
  step("moments", [&] { cpu::statistics(moments, workspace, 1); });
  step("combine",
       [&] { cpu::combine({shape, moments.moments, 1, moments.channels, moments.stats}); });
  backward.sums = memory(2 * c, narrow);
  step("reduce_sums", [&] { cpu::reduce(backward, workspace, 1); });
  step("coefficients", [&] {
    cpu::coefficients(
        {shape, moments.stats, backward.sums, memory(1, narrow), backward.grad[0].coefficients});
  });
}

// Without the activations of fp64 that are curves: their exp, expm1, log1p and erf are the C
// library's.
void print_all_bits() {
  many_exponents = true;
  optimizer_bits<Adam>({{1e-3, 0.9, 0.999, 1e-8, 0, 0, 1, false, false},
                        {1e-3, 0.9, 0.999, 1e-8, 0.01, 0.001, -1, true, false},
                        {1e-3, 0.9, 0.999, 1e-8, 0.01, 0, 1, false, true}});
  optimizer_bits<Sgd>({{1e-3, 0, 0, 0, 0, 1, false},
                       {1e-3, 0, 0, 0.9, 0, 1, false},
                       {1e-3, 0.01, 0.001, 0.9, 0.1, -1, true}});
  optimizer_bits<Rmsprop>(
      {{1e-2, 0.99, 1e-8, 0, 0, 0, 1, false}, {1e-2, 0.99, 1e-8, 0.01, 0.9, 0.001, -1, true}});
  optimizer_bits<Lion>({{1e-4, 0.9, 0.99, 0, 0, 1}, {1e-4, 0.9, 0.99, 0.01, 0.001, -1}});
  optimizer_bits<Fold>({{0.5, 1}});
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    std::vector<Activation> activations;
    for (int a = 0; a < kNumActivations; ++a) {
      const Activation act{a};
      if (dtype != DType::f64 || is_not_curved(act)) activations.push_back(act);
    }
    dropout_bits(dtype, activations);
    for (const bool channels_last : {false, true}) {
      for (const Activation act : activations) {
        batch_norm_bits({3, 19, 49, channels_last, dtype}, act, Join::none);
        batch_norm_bits({2, 64, 784, channels_last, dtype}, act, Join::none);
        batch_norm_bits({3, 19, 49, channels_last, dtype}, act, Join::residual);
        batch_norm_bits({3, 19, 49, channels_last, dtype}, act, Join::input);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    for (const std::string& name : cpu::available_instruction_sets()) std::puts(name.c_str());
    return 0;
  }
  if (argc > 3 || !cpu::set_instruction_set(argv[1])) return 2;
  if (argc == 3) {
    flipped = static_cast<uint8_t>(std::atoi(argv[2]));
    print_all_bits();
    return 0;
  }
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
