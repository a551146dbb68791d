// Every pass against the reference, over shapes around each vector, block and grid boundary.
#include "cuda/batch_norm_grid.h"
#include "intercept.h"
#include "norm.h"

namespace pass_tests {

using namespace harness;
using namespace norm;

namespace {

constexpr DType kAll[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

void check(const Spec& spec) { Problem(spec).check_all(); }

// The k-th of the choices that a shape does not decide.
void vary(Spec& spec, uint64_t k) {
  spec.salt = k;
  spec.dtype = kAll[k % 4];
  spec.activation = static_cast<Activation>(k % kNumActivations);
  spec.residual = k % 3 == 1;
  spec.inputs = k % 3 == 2 ? 2 : 1;
  spec.mask = two_slopes(spec.activation) && k % 2 == 0;
  spec.dy2 = k % 5 == 3;
  spec.weight = k % 7 != 2;
  spec.bias = k % 7 != 2 && k % 7 != 5;
  spec.running = k % 11 != 4;
  spec.narrow_params = k % 6 == 5;
  spec.cumulative = k % 9 == 1;
}

}  // namespace

TEST(channels_last_shapes) {
  const std::vector<int64_t> channels =
      small() ? std::vector<int64_t>{1, 7, 8, 20, 136}
              : std::vector<int64_t>{1,  2,  3,   4,   7,   8,   9,   15,  16,
                                     31, 64, 100, 128, 129, 136, 264, 1000};
  const std::vector<int64_t> pixels =
      small() ? std::vector<int64_t>{1, 9, 70} : std::vector<int64_t>{1, 2, 5, 16, 49, 130, 700};
  uint64_t k = 0;
  for (const int64_t c : channels) {
    for (const int64_t p : pixels) {
      if (c * p > 40000) continue;
      for (int repeat = 0; repeat < (small() ? 1 : 3); ++repeat) {
        Spec spec{.n = 2, .c = c, .spatial = p, .channels_last = true};
        vary(spec, k++);
        spec.phase = repeat == 1 ? 1 : 0;
        check(spec);
      }
    }
  }
}

TEST(planar_shapes) {
  const std::vector<int64_t> planes =
      small() ? std::vector<int64_t>{2, 7, 49}
              : std::vector<int64_t>{2, 3, 4, 7, 8, 9, 25, 49, 64, 100, 196, 255, 1024, 3000};
  uint64_t k = 0;
  for (const int64_t s : planes) {
    for (const int64_t c : {1, 3, 5}) {
      for (const int64_t n : {1, 4, 33}) {
        if (n * c * s > 20000 || (small() && n == 4)) continue;
        for (int repeat = 0; repeat < (small() ? 1 : 3); ++repeat) {
          Spec spec{.n = n, .c = c, .spatial = s, .channels_last = false};
          vary(spec, k++);
          spec.phase = repeat;
          check(spec);
        }
      }
    }
  }
}

// Each activation with each way to join and each way to know the derivative.
TEST(activations) {
  uint64_t salt = 500;
  for (int a = 0; a < kNumActivations; ++a) {
    for (int join = 0; join < 3; ++join) {
      for (const DType dtype : kAll) {
        if (small() && (a + join + static_cast<int>(dtype)) % 4 != 0) continue;
        for (const bool mask : {false, true}) {
          Spec spec{.n = 2, .c = 12, .spatial = 6, .channels_last = join != 1, .dtype = dtype};
          spec.salt = salt++;
          spec.activation = static_cast<Activation>(a);
          spec.residual = join == 1;
          spec.inputs = join == 2 ? 2 : 1;
          spec.mask = mask;
          spec.sigma = 3;
          spec.dy2 = (a + join) % 2 == 0;
          if (mask && !two_slopes(spec.activation)) continue;
          check(spec);
          spec.training = false;
          check(spec);
        }
      }
    }
  }
}

TEST(in_place) {
  uint64_t k = 900;
  for (const bool channels_last : {true, false}) {
    for (const DType dtype : kAll) {
      for (const Activation activation :
           {Activation::identity, Activation::relu, Activation::silu}) {
        Spec spec{.n = 3, .c = 9, .spatial = 40, .channels_last = channels_last, .dtype = dtype};
        vary(spec, k++);
        spec.dtype = dtype;
        spec.activation = activation;
        spec.in_place = true;
        spec.mask = activation == Activation::relu;
        check(spec);
      }
    }
  }
}

// All tensors equally far off a 16-byte boundary, or some farther.
TEST(misaligned) {
  uint64_t k = 1300;
  for (const bool channels_last : {true, false}) {
    for (const DType dtype : kAll) {
      for (const int phase : {1, 3}) {
        for (const int phase_of_y : {0, 1, 2}) {
          if (small() && phase_of_y == 2) continue;
          Spec spec{.n = 2, .c = 16, .spatial = 24, .channels_last = channels_last};
          vary(spec, k++);
          spec.dtype = dtype;
          spec.phase = phase;
          spec.phase_of_y = phase_of_y;
          check(spec);
        }
      }
    }
  }
}

// More values than a thread may add up in fp32, more blocks than the device runs at once: device 1
// has one multiprocessor.
TEST(long_runs) {
  const OnDevice one(1);
  for (const bool channels_last : {true, false}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      if (small() && dtype == DType::f32) continue;
      Spec spec{.n = small() ? 5 : 70,
                .c = channels_last ? 8 : 2,
                .spatial = 9001,
                .channels_last = channels_last,
                .dtype = dtype};
      spec.activation = Activation::relu;
      spec.mean = 30;
      check(spec);
      Problem(spec).check_statistics();
      const int64_t units = spec.n * spec.c * spec.spatial / (dtype == DType::f32 ? 4 : 8);
      CHECK(int64_t{intercept::last_grid()} * cuda::kNormThreads * cuda::kMaxRun >= units);
    }
  }
}

TEST(many_groups) {
  const OnDevice one(1);
  for (const bool channels_last : {true, false}) {
    Spec spec{.n = 2,
              .c = small() ? 300 : 2100,
              .spatial = 3,
              .channels_last = channels_last,
              .dtype = DType::bf16};
    spec.activation = Activation::relu;
    spec.mask = true;
    spec.residual = true;
    check(spec);
  }
}

TEST(masks) {
  uint64_t salt = 1700;
  for (int a = 0; a < kNumActivations; ++a) {
    const auto activation = static_cast<Activation>(a);
    if (!has_two_slopes(activation)) continue;
    for (const DType dtype : kAll) {
      for (const int64_t row : {8, 16, 21, 64, 65}) {
        if (small() && row != 21 && row != 16) continue;
        for (const bool channels_last : {true, false}) {
          Spec spec{.n = 3,
                    .c = channels_last ? row : 3,
                    .spatial = channels_last ? 5 : row,
                    .channels_last = channels_last,
                    .dtype = dtype};
          spec.activation = activation;
          spec.salt = salt++;
          spec.mask = spec.residual = true;
          spec.sigma = 4;
          check(spec);
        }
      }
    }
  }
}

TEST(random_problems) {
  Random random(seed());
  const int problems = small() ? 30 : 250;
  for (int i = 0; i < problems; ++i) {
    Spec spec;
    vary(spec, random.next());
    spec.n = 1 + random.below(5);
    spec.c = 1 + random.below(random.below(4) == 0 ? 300 : 20);
    spec.spatial = 1 + random.below(random.below(4) == 0 ? 300 : 30);
    spec.channels_last = spec.spatial == 1 || random.below(2) == 0;
    spec.n += spec.n * spec.spatial == 1;
    spec.training = random.below(5) != 0;
    spec.in_place = random.below(5) == 0;
    spec.phase = static_cast<int>(random.below(4));
    spec.phase_of_y = random.below(3) == 0 ? static_cast<int>(random.below(4)) : spec.phase;
    check(spec);
  }
}

}  // namespace pass_tests
