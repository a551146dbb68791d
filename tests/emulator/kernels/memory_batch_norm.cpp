// Counts the memory requests of the batch-norm kernels.
#include "cuda/batch_norm_launch.h"
#include "memory.h"

namespace {

using namespace braze;

template <class Args>
cuda::NormScratch scratch_for(const Args& args) {
  cuda::NormScratchSize size;
  if (cuda::batch_norm_scratch(args, size) != cudaSuccess) abort();
  return {device_memory("workspace", size.workspace),
          reinterpret_cast<unsigned*>(device_memory("tickets", size.tickets * sizeof(unsigned)))};
}

// The passes of a layer with relu; `off`: elements from 16 bytes to the tensors.
void count_layer(const std::string& name, const ActivationShape& shape, bool joined, size_t off) {
  const size_t element = size_of(shape.dtype);
  const size_t bytes = static_cast<size_t>(shape.numel()) * element;
  const auto tensor = [&](const char* of) { return device_memory(of, bytes, off * element); };
  const auto rows = [&](const char* of, int number) {
    return device_memory(of, static_cast<size_t>(number * shape.c) * 8);
  };
  StatisticsArgs statistics;
  statistics.shape = shape;
  statistics.x = tensor("x");
  statistics.stats = rows("stats", kStatsRows);
  ApplyArgs apply;
  apply.shape = shape;
  apply.input[0] = {statistics.x, statistics.stats};
  apply.activation = Activation::relu;
  apply.y = tensor("y");
  BackwardArgs backward;
  backward.shape = shape;
  backward.dy = tensor("dy");
  backward.input[0] = apply.input[0];
  backward.grad[0].coefficients = rows("coefficients", kCoefficientRows);
  backward.grad[0].dx = tensor("dx");
  backward.activation = Activation::relu;
  backward.count = static_cast<double>(shape.per_channel());
  if (joined) {
    apply.residual = tensor("residual");
    apply.mask =
        reinterpret_cast<uint8_t*>(device_memory("mask", static_cast<size_t>(shape.mask_bytes())));
    backward.mask = apply.mask;
    backward.grad_residual = tensor("grad_residual");
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
  count_layer("planes_bf16_7x7", {16, 8, 49, false, DType::bf16}, false, 0);
  count_layer("planes_bf16_off_by_1", {4, 2, 4096, false, DType::bf16}, false, 1);
}
