// Counts the memory requests of the kernels: here the optimizers', and of kernels whose figures are
// known.
#include "memory.h"

#include <vector>

#include "cuda/optimizer_launch.h"

namespace {

using namespace braze;

__global__ void strided_kernel(const float* in, float* out) {
  out[threadIdx.x] = in[8 * threadIdx.x];
}

template <int kStride>
__global__ void transpose_kernel(const float* in, float* out) {
  BRAZE_SHARED(float, tile, 32 * kStride);
  tile[threadIdx.y * kStride + threadIdx.x] = in[threadIdx.y * 32 + threadIdx.x];
  __syncthreads();
  out[threadIdx.y * 32 + threadIdx.x] = tile[threadIdx.x * kStride + threadIdx.y];
}

__global__ void vector_kernel(const float* in, float* out) {
  cuda::store16(out + 4 * threadIdx.x, cuda::load16(in + 4 * threadIdx.x));
}

constexpr int64_t kElements = 12288;

// One tensor of one chunk and a half, `phase` elements off 16 bytes.
TensorWork tensor(DType dtype, DType state, int phase) {
  const auto operand = [&](const char* name, DType of) {
    const size_t size = size_of(of);
    return Operand{device_memory(name, kElements * size, static_cast<size_t>(phase) * size),
                   nullptr, of};
  };
  TensorWork work;
  work.numel = kElements;
  work.is_double = dtype == DType::f64;
  work.param = operand("param", dtype);
  work.grad = operand("grad", dtype);
  work.sum.dtype = dtype;
  work.state[0] = operand("state0", state);
  work.state[1] = operand("state1", state);
  return work;
}

void count_steps() {
  DeviceHyper<Adam> on_device = {};
  on_device.options = {1e-3, 0.9, 0.999, 1e-8, 0, 0, 1, false, false};
  on_device.inputs.step = 1;
  const std::vector adam = {make_hyper<Adam>(on_device.options, on_device.inputs)};
  const Sgd::Options sgd_options = {1e-2, 0, 0, 0.9, 0, 1, false};
  const std::vector sgd = {make_hyper<Sgd>(sgd_options, {})};
  const std::vector fold = {make_hyper<Fold>({.weight = 1, .keep = 1}, {})};
  const std::vector made_on_device = {on_device};
  const struct {
    const char* name;
    DType dtype, state;
    int phase;
  } cases[] = {
      {"f32", DType::f32, DType::f32, 0}, {"f32_off_by_1", DType::f32, DType::f32, 1},
      {"f64", DType::f64, DType::f64, 0}, {"bf16", DType::bf16, DType::bf16, 0},
      {"f16", DType::f16, DType::f16, 0}, {"bf16_with_f32_state", DType::bf16, DType::f32, 0}};
  for (const auto& c : cases) {
    const std::vector<TensorWork> work = {tensor(c.dtype, c.state, c.phase)};
    const std::string name = c.name;
    cuda::StepLauncher launcher;
    count("adam_" + name, [&] { return launcher.step({work, 1}, view_of(adam), {}, nullptr); });
    count("sgd_" + name, [&] { return launcher.step({work, 2}, view_of(sgd), {}, nullptr); });
    count("fold_" + name, [&] { return launcher.step({work, 3}, view_of(fold), {}, nullptr); });
    cuda::StepScale scale;
    scale.sums = reinterpret_cast<double*>(device_memory("sums", 2 * sizeof(double)));
    auto* totals = reinterpret_cast<cuda::MeasuredTotals*>(
        device_memory("totals", sizeof(cuda::MeasuredTotals)));
    count("measure_" + name, [&] {
      return launcher.measure({work, 4}, view_of(adam), 1, scale, false, totals, nullptr);
    });
    std::vector<TensorWork> averaged = work;
    const DType wide = c.dtype == DType::f64 ? c.dtype : DType::f32;
    const size_t size = size_of(wide);
    averaged[0].average = {
        device_memory("average", kElements * size, static_cast<size_t>(c.phase) * size), nullptr,
        wide};
    count("averaged_" + name,
          [&] { return launcher.step({averaged, 5}, view_of(sgd), {}, nullptr); });
  }
  std::vector<TensorWork> work = {tensor(DType::f32, DType::f32, 0)};
  work[0].step = {device_memory("step", 4), nullptr, DType::f32};
  cuda::StepLauncher launcher;
  count("adam_device",
        [&] { return launcher.step({work, 1}, view_of(made_on_device), {}, nullptr); });
}

}  // namespace

void count_batch_norm();
void count_conv();
void count_dropout();

int main() {
  auto* in = reinterpret_cast<float*>(device_memory("in", 4096));
  auto* out = reinterpret_cast<float*>(device_memory("out", 4096));
  const dim3 square(32, 32);
  count("control_strided",
        [&] { return BRAZE_LAUNCH(strided_kernel, 1, 32, 0, nullptr, in, out); });
  count("control_vector", [&] { return BRAZE_LAUNCH(vector_kernel, 1, 32, 0, nullptr, in, out); });
  count("control_transpose",
        [&] { return BRAZE_LAUNCH((transpose_kernel<32>), 1, square, 0, nullptr, in, out); });
  count("control_padded_transpose",
        [&] { return BRAZE_LAUNCH((transpose_kernel<33>), 1, square, 0, nullptr, in, out); });
  count_steps();
  count_batch_norm();
  count_dropout();
  count_conv();
  return 0;
}
