// Counts the memory requests of the batch-norm kernels.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/batch_norm_launch.h"
#include "emulator/hooks.h"

namespace {

using namespace braze;

char* device_memory(size_t bytes) {
  void* memory = nullptr;
  if (cudaMalloc(&memory, bytes + 64) != cudaSuccess) abort();
  memset(memory, 0, bytes + 64);
  return static_cast<char*>(memory);
}

template <class Launch>
void count(const std::string& name, Launch launch) {
  emulator::count_memory(true);
  const cudaError_t error = launch();
  emulator::count_memory(false);
  if (error != cudaSuccess) {
    printf("%s: %s\n", name.c_str(), cudaGetErrorString(error));
    exit(1);
  }
  emulator::print_memory_counts(name.c_str());
}

template <class Args>
cuda::NormScratch scratch_for(const Args& args) {
  cuda::NormScratchSize size;
  if (cuda::batch_norm_scratch(args, size) != cudaSuccess) abort();
  return {device_memory(size.workspace),
          reinterpret_cast<unsigned*>(device_memory(size.tickets * sizeof(unsigned)))};
}

// The passes of a layer with relu; `off`: elements from 16 bytes to the tensors.
void count_layer(const std::string& name, const ActivationShape& shape, bool joined, size_t off) {
  const size_t element = shape.dtype == DType::f64 ? 8 : shape.dtype == DType::f32 ? 4 : 2;
  const size_t bytes = static_cast<size_t>(shape.numel()) * element;
  const auto tensor = [&] { return device_memory(bytes) + off * element; };
  const auto row = [&](int rows) { return device_memory(static_cast<size_t>(rows * shape.c) * 8); };
  StatisticsArgs statistics;
  statistics.shape = shape;
  statistics.x = tensor();
  statistics.stats = row(kStatsRows);
  ApplyArgs apply;
  apply.shape = shape;
  apply.input[0] = {statistics.x, statistics.stats};
  apply.activation = Activation::relu;
  apply.y = tensor();
  BackwardArgs backward;
  backward.shape = shape;
  backward.dy = tensor();
  backward.input[0] = apply.input[0];
  backward.grad[0].coefficients = row(kCoefficientRows);
  backward.grad[0].dx = tensor();
  backward.activation = Activation::relu;
  backward.count = static_cast<double>(shape.per_channel());
  if (joined) {
    apply.residual = tensor();
    apply.mask = reinterpret_cast<uint8_t*>(device_memory(static_cast<size_t>(shape.mask_bytes())));
    backward.mask = apply.mask;
    backward.grad_residual = tensor();
  }
  const cuda::NormScratch forward = scratch_for(statistics), back = scratch_for(backward);
  count("norm_statistics_" + name,
        [&] { return cuda::batch_norm_statistics(statistics, forward, nullptr); });
  count("norm_apply_" + name, [&] { return cuda::batch_norm_apply(apply, nullptr); });
  count("norm_reduce_" + name, [&] { return cuda::batch_norm_reduce(backward, back, nullptr); });
  count("norm_apply_grad_" + name, [&] { return cuda::batch_norm_apply_grad(backward, nullptr); });
}

}  // namespace

void count_batch_norm() {
  count_layer("last_bf16", {2, 256, 64, true, DType::bf16}, false, 0);
  count_layer("last_f32", {2, 128, 64, true, DType::f32}, false, 0);
  count_layer("last_f64", {2, 64, 64, true, DType::f64}, false, 0);
  count_layer("last_bf16_joined", {2, 256, 64, true, DType::bf16}, true, 0);
  count_layer("last_f32_joined", {2, 128, 64, true, DType::f32}, true, 0);
  count_layer("last_bf16_100_channels", {2, 100, 64, true, DType::bf16}, false, 0);
  count_layer("planes_bf16", {4, 2, 4096, false, DType::bf16}, false, 0);
  count_layer("planes_f32", {4, 2, 2048, false, DType::f32}, false, 0);
  count_layer("planes_bf16_7x7", {64, 2, 49, false, DType::bf16}, false, 0);
  count_layer("planes_bf16_off_by_1", {4, 2, 4096, false, DType::bf16}, false, 1);
}
