// Counts the memory requests of the convolution kernels, and of ldmatrix and cp.async.
#include "cuda/conv_launch.h"
#include "cuda/ptx.cuh"
#include "memory.h"

namespace {

using namespace braze;

// Four matrices of eight rows, kStride chunks of 16 bytes apart, that cp.async has brought.
template <int kStride>
__global__ void matrices_kernel(const uint4* in, uint4* out) {
  BRAZE_SHARED(uint4, rows, 32 * kStride);
  uint4* const own = rows + kStride * threadIdx.x;
  cuda::cp_async16_or_zero(own, in + threadIdx.x, threadIdx.x % 4 != 3);
  cuda::cp_async_commit();
  cuda::cp_async_wait<0>();
  __syncwarp();
  uint32_t words[4];
  cuda::ldmatrix_x4(own, words);
  cuda::store16(out + threadIdx.x, uint4{words[0], words[1], words[2], words[3]});
}

template <class Args>
cuda::NormScratch scratch_for(const Args& args) {
  cuda::NormScratchSize size;
  if (cuda::conv_scratch(args, size) != cudaSuccess) abort();
  return {device_memory("workspace", size.workspace),
          reinterpret_cast<unsigned*>(device_memory("tickets", size.tickets * sizeof(unsigned)))};
}

void count_layer(const std::string& name, ConvShape shape) {
  shape.out_h = (shape.h + 2 * shape.padding - shape.kernel) / shape.stride + 1;
  shape.out_w = (shape.w + 2 * shape.padding - shape.kernel) / shape.stride + 1;
  const auto tensor = [](const char* of, int64_t elements) {
    return device_memory(of, static_cast<size_t>(elements) * 2);
  };
  const auto rows = [](const char* of, int number, int64_t channels) {
    return device_memory(of, static_cast<size_t>(number * channels) * 4);
  };
  const int64_t inputs = shape.input().numel(), outputs = shape.output().numel();
  const int64_t weights = shape.k * shape.taps() * shape.c;
  ConvForwardArgs forward;
  forward.shape = shape;
  forward.input = {tensor("x", inputs), rows("stats", kStatsRows, shape.c), Activation::relu};
  forward.weight = tensor("weight", weights);
  forward.output = tensor("output", outputs);
  forward.stats = rows("stats", kStatsRows, shape.k);
  ConvInputGradArgs input_grad;
  input_grad.shape = shape;
  input_grad.grad = {tensor("d", outputs), forward.output, forward.stats,
                     rows("coefficients", kCoefficientRows, shape.k)};
  input_grad.weight = forward.weight;
  input_grad.input = forward.input;
  input_grad.norm.coefficients = rows("coefficients", kCoefficientRows, shape.c);
  input_grad.result = tensor("result", inputs);
  ConvWeightGradArgs weight_grad;
  weight_grad.shape = shape;
  weight_grad.input = forward.input;
  weight_grad.grad = input_grad.grad;
  weight_grad.result = tensor("result", weights);
  weight_grad.result_dtype = shape.dtype;
  const cuda::NormScratch scratch = scratch_for(forward), back = scratch_for(input_grad),
                          of_weight = scratch_for(weight_grad);
  count("conv_forward_" + name, [&] { return cuda::conv_forward(forward, scratch, nullptr); });
  count("conv_input_grad_" + name,
        [&] { return cuda::conv_input_grad(input_grad, back, nullptr); });
  count("conv_weight_grad_" + name,
        [&] { return cuda::conv_weight_grad(weight_grad, of_weight, nullptr); });
}

}  // namespace

void count_conv() {
  auto* in = reinterpret_cast<uint4*>(device_memory("in", 512));
  auto* out = reinterpret_cast<uint4*>(device_memory("out", 512));
  count("control_matrices",
        [&] { return BRAZE_LAUNCH((matrices_kernel<8>), 1, 32, 0, nullptr, in, out); });
  count("control_padded_matrices",
        [&] { return BRAZE_LAUNCH((matrices_kernel<9>), 1, 32, 0, nullptr, in, out); });
  // Two tiles of pixels, one and two slabs of channels.
  count_layer("1x1", {.n = 2, .h = 8, .w = 16, .c = 64, .k = 128});
  count_layer("1x1_narrow", {.n = 2, .h = 8, .w = 16, .c = 128, .k = 64});
  count_layer("3x3", {.n = 2, .h = 8, .w = 16, .c = 64, .k = 64, .kernel = 3, .padding = 1});
  count_layer("3x3_stride_2",
              {.n = 4, .h = 16, .w = 16, .c = 64, .k = 64, .kernel = 3, .stride = 2, .padding = 1});
}
