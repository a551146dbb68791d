// What is not a shape: hard numbers, emptiness, several processes, capture, repeatability.
#include <cmath>
#include <cstring>
#include <limits>

#include "math/batch_norm.h"
#include "norm.h"

namespace edge_tests {

using namespace harness;
using namespace norm;

namespace {

constexpr DType kAll[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

bool statistics(Problem& p) {
  const StatisticsArgs args = p.statistics_args(0);
  const Memory memory = memory_for(args);
  const bool good = CHECK_OK(cuda::batch_norm_statistics(args, memory.scratch, nullptr));
  CHECK_OK(cudaDeviceSynchronize());
  memory.check();
  return good;
}

}  // namespace

TEST(mean_far_from_zero) {
  const struct {
    double mean, sigma;
  } cases[] = {{30, 1}, {-30, 1}, {1e4, 1e-2}, {1e6, 1}, {-3e-20, 1e-20}, {0, 1e15}};
  for (const auto& c : cases) {
    for (const bool channels_last : {true, false}) {
      for (const DType dtype : {DType::f32, DType::f64}) {
        Spec spec{.n = 4,
                  .c = 8,
                  .spatial = small() ? 100 : 1500,
                  .channels_last = channels_last,
                  .dtype = dtype};
        spec.mean = c.mean;
        spec.sigma = c.sigma;
        spec.eps = c.sigma * c.sigma * 1e-5;
        Case note("%s", describe(spec));
        Problem(spec).check_statistics();
      }
    }
  }
}

TEST(constant_channel) {
  for (const DType dtype : kAll) {
    for (const bool channels_last : {true, false}) {
      Spec spec{.n = 3, .c = 5, .spatial = 77, .channels_last = channels_last, .dtype = dtype};
      spec.mean = 3.5;
      spec.sigma = 0;
      Case note("%s", describe(spec));
      Problem p(spec);
      p.check_statistics();
      p.check_apply();
    }
  }
}

// The first value is far from all others: the shift is a bad one there.
TEST(outlier) {
  for (const bool channels_last : {true, false}) {
    Spec spec{.n = 2, .c = 4, .spatial = 2000, .channels_last = channels_last};
    Case note("%s", describe(spec));
    Problem p(spec);
    for (int64_t c = 0; c < spec.c; ++c) p.x[0].set(offset_of(spec, 0, c, 0), 1e6);
    double mean = 0, square = 0;
    const double count = static_cast<double>(spec.n * spec.spatial);
    for (int64_t i = 0; i < spec.n * spec.spatial; ++i) {
      mean += p.x[0].get(offset_of(spec, i / spec.spatial, 0, i % spec.spatial)) / count;
    }
    for (int64_t i = 0; i < spec.n * spec.spatial; ++i) {
      const double d = p.x[0].get(offset_of(spec, i / spec.spatial, 0, i % spec.spatial)) - mean;
      square += d * d;
    }
    if (!statistics(p)) continue;
    const double invstd = 1 / std::sqrt(square / count + spec.eps);
    CHECK(near(p.stats[0].get(0) + p.stats[0].get(kMeanLow * spec.c), mean, 1e-6 / invstd));
    CHECK(near(p.stats[0].get(kInvstd * spec.c), invstd, 1e-6 * invstd));
  }
}

TEST(not_finite) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double value : {infinity, -infinity, std::nan("")}) {
    for (const bool channels_last : {true, false}) {
      for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
        Spec spec{.n = 2, .c = 9, .spatial = 30, .channels_last = channels_last, .dtype = dtype};
        Case note("%s, %g", describe(spec), value);
        Problem p(spec);
        p.x[0].set(offset_of(spec, 1, 4, 7), value);
        if (!statistics(p)) continue;
        for (int64_t c = 0; c < spec.c; ++c) {
          const double mean = p.stats[0].get(c), invstd = p.stats[0].get(kInvstd * spec.c + c);
          if (c != 4) {
            CHECK(std::isfinite(mean) && std::isfinite(invstd));
          } else {
            CHECK(near(mean, value, 0) && std::isnan(invstd));
          }
        }
      }
    }
  }
}

TEST(empty) {
  for (const DType dtype : kAll) {
    for (const bool channels_last : {true, false}) {
      for (const auto& [n, c, s] : {std::tuple{0, 20, 6}, {3, 20, 0}, {0, 0, 4}, {4, 0, 4}}) {
        Spec spec{.n = n, .c = c, .spatial = s, .channels_last = channels_last, .dtype = dtype};
        spec.activation = Activation::relu;
        spec.residual = spec.mask = true;
        const Case note("%s", describe(spec));
        Problem p(spec);
        const int64_t before = emulator::launch_count(0);
        const bool good = p.check_statistics() && p.check_apply();
        CHECK(emulator::launch_count(0) == before + 1);
        if (good) p.check_backward();
        CHECK(emulator::launch_count(0) == before + 1 + (c > 0));
      }
    }
  }
}

// The batch in uneven parts, as processes have it, gives the statistics of the whole.
TEST(processes) {
  for (const DType dtype : kAll) {
    for (const bool channels_last : {true, false}) {
      Spec spec{.n = 9, .c = 300, .spatial = 4, .channels_last = channels_last, .dtype = dtype};
      spec.mean = 20;
      spec.cumulative = dtype == DType::f32;
      const Case note("%s", describe(spec));
      Problem whole(spec), parts(spec);
      const int64_t images[] = {4, 0, 5};
      const DType type = arithmetic(dtype);
      const size_t size = type == DType::f64 ? 8 : 4;
      Array moments(type, 3 * kMomentsRows * spec.c);
      int64_t first = 0;
      for (int process = 0; process < 3; ++process) {
        Spec part = spec;
        part.n = images[process];
        Problem p(part);
        for (int64_t i = 0; i < p.x[0].count(); ++i) {
          p.x[0].set(i, whole.x[0].get(first * spec.c * spec.spatial + i));
        }
        first += part.n;
        StatisticsArgs args = p.statistics_args(0);
        const std::vector<char> before = p.results();
        args.moments = static_cast<char*>(moments.data()) +
                       static_cast<size_t>(process * kMomentsRows * spec.c) * size;
        const Memory memory = memory_for(args);
        CHECK_OK(cuda::batch_norm_statistics(args, memory.scratch, nullptr));
        CHECK_OK(cudaDeviceSynchronize());
        memory.check();
        CHECK(p.results() == before);
      }
      CombineArgs args{spec.shape(), moments.data(), 3, parts.channels(0), parts.stats[0].data()};
      const Memory memory = memory_for(args);
      CHECK_OK(cuda::batch_norm_combine(args, memory.scratch, nullptr));
      CHECK_OK(cudaDeviceSynchronize());
      memory.check();
      statistics(whole);
      CHECK(*static_cast<int64_t*>(parts.tracked[0].data()) == 4);
      // Moments of fp32 have a mean of fp32.
      const double unit = type == DType::f64 ? 1e-13 : 1e-6, far = type == DType::f64 ? 0 : 6e-6;
      for (int64_t i = 0; i < kStatsRows * spec.c; ++i) {
        if (i / spec.c == kMeanLow) continue;
        const double want = whole.stats[0].get(i);
        if (!CHECK(near(parts.stats[0].get(i), want, unit * (std::fabs(want) + 1) + far))) break;
      }
      for (int64_t c = 0; c < spec.c; ++c) {
        const double mean = whole.running_mean[0].get(c), variance = whole.running_var[0].get(c);
        if (!CHECK(near(parts.running_mean[0].get(c), mean, 1e-6 * (std::fabs(mean) + 1))) ||
            !CHECK(near(parts.running_var[0].get(c), variance, 2e-6 * variance))) {
          break;
        }
      }
    }
  }
}

// Coefficients from sums that come from elsewhere are those that reduce makes of the same sums.
TEST(coefficients) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    Spec spec{.n = 3, .c = 300, .spatial = 5, .channels_last = true, .dtype = dtype};
    const Case note("%s", describe(spec));
    Problem p(spec);
    p.set_stats();
    const BackwardArgs backward = p.backward_args();
    const Memory memory = memory_for(backward);
    CHECK_OK(cuda::batch_norm_reduce(backward, memory.scratch, nullptr));
    Array made(p.coefficients[0].dtype(), p.coefficients[0].count());
    Array count(p.coefficients[0].dtype(), 1);
    count.set(0, 15);
    const CoefficientsArgs args{spec.shape(), p.stats[0].data(), p.sums.data(), count.data(),
                                made.data()};
    CHECK_OK(cuda::batch_norm_coefficients(args, nullptr));
    CHECK_OK(cudaDeviceSynchronize());
    for (int64_t i = 0; i < made.count(); ++i) {
      const double want = p.coefficients[0].get(i);
      const double unit = dtype == DType::f64 ? 1e-15 : 3e-7;  // sums were rounded
      if (!CHECK(near(made.get(i), want, unit * (std::fabs(want) + 1)))) break;
    }
  }
}

// dx alone, dx2 alone, the residual's gradient alone: what is not wanted is not written.
TEST(wanted_in_part) {
  for (int wanted = 0; wanted < 3; ++wanted) {
    Spec spec{.n = 2, .c = 10, .spatial = 9, .channels_last = true, .dtype = DType::bf16};
    spec.activation = Activation::relu;
    spec.residual = wanted == 0;
    spec.inputs = wanted == 0 ? 1 : 2;
    const Case note("%s, only %d", describe(spec), wanted);
    Problem all(spec), part(spec);
    all.set_stats();
    part.set_stats();
    CHECK(all.check_backward());
    BackwardArgs args = part.backward_args();
    args.grad[wanted == 1].dx = nullptr;
    args.grad[wanted == 1].grad_weight = args.grad[wanted == 1].grad_bias = nullptr;
    args.grad[wanted == 1].coefficients = nullptr;
    args.sums = nullptr;
    const std::vector<char> untouched = part.dx[wanted == 1].bytes();
    const Memory memory = memory_for(args);
    CHECK_OK(cuda::batch_norm_reduce(args, memory.scratch, nullptr));
    CHECK_OK(cuda::batch_norm_apply_grad(args, nullptr));
    CHECK_OK(cudaDeviceSynchronize());
    CHECK(part.dx[wanted == 1].bytes() == untouched);
    if (wanted == 0) CHECK(part.grad_residual.bytes() == all.grad_residual.bytes());
    if (wanted != 0) CHECK(part.dx[wanted != 1].bytes() == all.dx[wanted != 1].bytes());
    if (wanted != 0) {
      CHECK(part.grad_weight[wanted != 1].bytes() == all.grad_weight[wanted != 1].bytes());
    }
  }
}

// Running statistics do not depend on x: its infinities stay out of dx.
TEST(infinite_input_with_running_statistics) {
  for (const Activation activation : {Activation::identity, Activation::leaky_relu}) {
    Spec spec{.n = 2, .c = 3, .spatial = 8, .channels_last = true};
    spec.activation = activation;
    spec.training = false;
    Problem p(spec);
    p.set_stats();
    for (int64_t i = 0; i < p.x[0].count(); i += 5) {
      p.x[0].set(i, std::numeric_limits<double>::infinity());
    }
    const BackwardArgs args = p.backward_args();
    const Memory memory = memory_for(args);
    CHECK_OK(cuda::batch_norm_reduce(args, memory.scratch, nullptr));
    CHECK_OK(cuda::batch_norm_apply_grad(args, nullptr));
    CHECK_OK(cudaDeviceSynchronize());
    for (int64_t i = 0; i < p.dx[0].count(); ++i) CHECK(std::isfinite(p.dx[0].get(i)));
    for (int64_t c = 0; c < spec.c; ++c) {
      CHECK(p.coefficients[0].get(kOnGrad * spec.c + c) == p.stats[0].get(kScale * spec.c + c));
      CHECK(p.coefficients[0].get(kOnInput * spec.c + c) == 0);
      CHECK(p.coefficients[0].get(kConstant * spec.c + c) == 0);
    }
  }
}

TEST(masks_are_for_two_slopes) {
  Spec spec;
  Problem p(spec);
  p.set_stats();
  ApplyArgs apply = p.apply_args();
  apply.activation = Activation::silu;
  apply.mask = static_cast<uint8_t*>(p.mask.data());
  CHECK_CODE(cuda::batch_norm_apply(apply, nullptr), cudaErrorInvalidValue);
  BackwardArgs backward = p.backward_args();
  backward.activation = Activation::silu;
  backward.mask = apply.mask;
  cuda::NormScratchSize size;
  CHECK_CODE(cuda::batch_norm_scratch(backward, size), cudaErrorInvalidValue);
  CHECK_CODE(cuda::batch_norm_apply_grad(backward, nullptr), cudaErrorInvalidValue);
}

}  // namespace edge_tests
