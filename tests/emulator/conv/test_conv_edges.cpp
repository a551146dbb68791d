// What is not a shape: hard numbers, emptiness, what is not wanted.
#include <cmath>
#include <limits>

#include "convolution.h"

namespace conv_edge_tests {

using namespace harness;
using namespace convolution;

namespace {

Spec spec_of(int kernel, DType dtype) {
  return {.kernel = kernel, .padding = kernel / 2, .dtype = dtype};
}

}  // namespace

// Most numbers are below the least normal one, of the input or of the gradient.
TEST(denormals) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const int kernel : {1, 3}) {
      if (small() && (kernel == 1) == (dtype == DType::f16)) continue;
      Spec spec = spec_of(kernel, dtype);
      spec.normalised = spec.after_norm = false;
      const double tiny = dtype == DType::bf16 ? 0x1p-129 : 0x1p-17;
      spec.mean = 0;
      spec.sigma = tiny;
      Problem(spec).check_all();
      spec.sigma = 1;
      spec.grad_sigma = tiny;
      Problem(spec).check_all();
    }
  }
}

TEST(mean_far_from_zero) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const int kernel : {1, 3}) {
      for (const bool normalised : {false, true}) {
        if (small() && (kernel == 1) == normalised) continue;
        Spec spec = spec_of(kernel, dtype);
        spec.n = 3;
        spec.h = small() ? 5 : 11;
        spec.mean = -30;
        spec.weight_mean = 0.5;
        spec.normalised = normalised;
        spec.activation = Activation::identity;
        Problem(spec).check_all();
      }
    }
  }
}

// One pixel, at a corner or within: what does not see it stays finite.
TEST(not_finite) {
  const double infinity = std::numeric_limits<double>::infinity();
  enum Place { kInput, kGradient, kOutput };
  for (const double value : {infinity, -infinity, std::nan("")}) {
    for (const Place place : {kInput, kGradient, kOutput}) {
      for (const int64_t pixel : {0, 45, 62}) {
        for (const int kernel : {1, 3}) {
          if (pixel != 45 && (small() || value != infinity)) continue;
          if (small() && (kernel == 1 || value != infinity)) continue;
          for (const bool normalised : {false, true}) {
            Spec spec = spec_of(kernel, pixel % 2 == 0 ? DType::bf16 : DType::f16);
            spec.h = 7;
            spec.w = 9;
            spec.n = 1;
            spec.stride = pixel == 45 ? 2 : 1;
            spec.normalised = normalised;
            spec.after_norm = place == kOutput;
            spec.activation = value < 0 ? Activation::leaky_relu : Activation::relu;
            const Case note("%g at %d, %lld", value, place, static_cast<long long>(pixel));
            Problem p(spec);
            Array& array = place == kInput      ? p.before.x[0]
                           : place == kGradient ? p.after.dy
                                                : p.after.x[0];
            const int64_t channels = place == kInput ? spec.c : spec.k;
            array.set(pixel * channels % array.count() + 3, value);
            p.check_all();
          }
        }
      }
    }
  }
}

// Zero is what padding is, not the activation of a shift.
TEST(padding_is_zero) {
  for (const int kernel : {1, 3}) {
    Spec spec = spec_of(kernel, DType::bf16);
    spec.padding = 1;
    spec.mean = -30;
    spec.activation = Activation::identity;
    Problem p(spec);
    for (int64_t c = 0; c < spec.c; ++c) p.before.stats[0].set(kShift * spec.c + c, 50);
    p.check_all();
  }
}

TEST(empty) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const int kernel : {1, 3}) {
      for (const bool f32_result : {false, true}) {
        Spec spec = spec_of(kernel, dtype);
        spec.n = 0;
        spec.c = 24;
        spec.f32_result = f32_result;
        Problem(spec).check_all();
        spec.normalised = spec.after_norm = false;
        Problem(spec).check_all();
      }
    }
  }
}

// The gradient of the input without those of the batch norm's parameters, or with one of them.
TEST(wanted_in_part) {
  for (int wanted = 0; wanted < 3; ++wanted) {
    const Spec spec = spec_of(3, DType::bf16);
    const Case note("%s, only %d", describe(spec), wanted);
    Problem all(spec), part(spec);
    CHECK(all.check_input_grad());
    ConvInputGradArgs args = part.input_grad_args();
    if (wanted != 1) args.norm.grad_weight = nullptr;
    if (wanted != 2) args.norm.grad_bias = nullptr;
    const std::vector<char> weight = part.before.grad_weight[0].bytes();
    const std::vector<char> bias = part.before.grad_bias[0].bytes();
    const norm::Memory memory = memory_for(args);
    CHECK_OK(cuda::conv_input_grad(args, memory.scratch, nullptr));
    CHECK_OK(cudaDeviceSynchronize());
    CHECK(part.before.dx[0].bytes() == all.before.dx[0].bytes());
    CHECK(part.before.coefficients[0].bytes() == all.before.coefficients[0].bytes());
    CHECK(part.before.grad_weight[0].bytes() ==
          (wanted == 1 ? all.before.grad_weight[0].bytes() : weight));
    CHECK(part.before.grad_bias[0].bytes() ==
          (wanted == 2 ? all.before.grad_bias[0].bytes() : bias));
  }
}

}  // namespace conv_edge_tests
