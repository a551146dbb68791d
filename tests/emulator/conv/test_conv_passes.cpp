// Every pass against the reference, over geometries, channels around each tile's edge, and options.
#include "convolution.h"

namespace conv_pass_tests {

using namespace harness;
using namespace convolution;

namespace {

constexpr Activation kActivations[] = {Activation::identity, Activation::relu, Activation::relu6,
                                       Activation::leaky_relu};

struct Geometry {
  int kernel, stride, padding;
};
constexpr Geometry kGeometries[] = {{1, 1, 0}, {1, 2, 0}, {1, 1, 1}, {1, 2, 1},
                                    {3, 1, 1}, {3, 2, 1}, {3, 1, 0}, {3, 2, 0}};

// The k-th of the choices that a shape does not decide.
Spec vary(const Geometry& g, uint64_t k) {
  Random random(k);
  Spec spec{.kernel = g.kernel, .stride = g.stride, .padding = g.padding};
  spec.salt = k;
  spec.dtype = random.below(2) == 0 ? DType::bf16 : DType::f16;
  spec.activation = kActivations[random.below(4)];
  spec.normalised = random.below(4) != 0;
  spec.after_norm = random.below(4) != 0;
  spec.f32_result = random.below(2) == 0;
  spec.weight = random.below(4) != 0;
  spec.bias = spec.weight && random.below(4) != 0;
  spec.running = random.below(4) != 0;
  spec.narrow_params = random.below(4) == 0;
  spec.cumulative = random.below(4) == 0;
  return spec;
}

void check(const Spec& spec) { Problem(spec).check_all(); }

}  // namespace

TEST(geometries) {
  struct Size {
    int64_t n, h, w;
  };
  uint64_t salt = 0;
  for (const Geometry& g : kGeometries) {
    for (const Size& size : {Size{3, 1, 1}, {1, 1, 3}, {2, 5, 7}, {3, 4, 4}, {1, 13, 11}}) {
      if (size.h + 2 * g.padding < g.kernel) continue;
      for (const int64_t channels : {8, 24}) {
        ++salt;
        if (small() && (salt % 7 != 0 || size.h > 5)) continue;
        Spec spec = vary(g, salt);
        spec.n = size.n;
        spec.h = size.h;
        spec.w = size.w;
        spec.c = channels;
        spec.k = 32 - channels;
        check(spec);
      }
    }
  }
}

TEST(channels) {
  constexpr int64_t kChannels[] = {8, 24, 64, 72, 136, 200};
  uint64_t salt = 100;
  for (const int64_t c : kChannels) {
    for (const int64_t k : kChannels) {
      ++salt;
      if (small() && salt % 8 != 5) continue;
      Spec spec = vary({1, 1, 0}, salt);
      spec.h = 3;
      spec.c = c;
      spec.k = k;
      check(spec);
    }
  }
}

TEST(channels_of_taps) {
  uint64_t salt = 200;
  for (const auto& [c, k] :
       {std::pair{8, 72}, {72, 8}, {64, 64}, {136, 24}, {24, 136}, {64, 200}}) {
    ++salt;
    if (small() && salt % 6 != 0) continue;
    Spec spec = vary({3, salt % 3 == 1 ? 2 : 1, 1}, salt);
    spec.h = 4;
    spec.w = 3;
    spec.c = c;
    spec.k = k;
    check(spec);
  }
}

TEST(activations) {
  uint64_t salt = 300;
  for (const Activation activation : kActivations) {
    for (const DType dtype : {DType::bf16, DType::f16}) {
      for (const bool after_norm : {false, true}) {
        for (const int kernel : {1, 3}) {
          ++salt;
          if (small() && salt % 4 != 1) continue;
          Spec spec = vary({kernel, 1, kernel / 2}, salt);
          spec.dtype = dtype;
          spec.normalised = true;
          spec.activation = activation;
          spec.after_norm = after_norm;
          spec.sigma = 3;
          check(spec);
        }
      }
    }
  }
}

// More pixels than a tile, and more tiles than the device runs at once: device 1 has one
// multiprocessor.
TEST(many_pixels) {
  uint64_t salt = 400;
  for (const Geometry& g : kGeometries) {
    ++salt;
    if (small() && salt % 8 != 5) continue;
    Spec spec = vary(g, salt);
    spec.n = 3;
    spec.h = 15;
    spec.w = 19;
    if (!small()) check(spec);
    const OnDevice one(1);
    check(spec);
  }
}

// Few blocks, for TSan.
TEST(few_tiles) {
  uint64_t salt = 500;
  for (const Geometry& g : kGeometries) {
    ++salt;
    if (small() && salt % 2 != 1) continue;
    Spec spec = vary(g, salt);
    spec.n = 2;
    spec.h = 9;
    spec.w = 11;
    spec.c = 40;
    spec.normalised = spec.after_norm = true;
    const OnDevice one(1);
    check(spec);
  }
}

TEST(random_problems) {
  Random random(seed());
  const int problems = small() ? 4 : 40;
  for (int i = 0; i < problems; ++i) {
    Spec spec = vary(kGeometries[random.below(8)], random.next());
    spec.n = 1 + random.below(4);
    spec.h = 1 + random.below(12);
    spec.w = 1 + random.below(12);
    spec.c = 8 + 8 * random.below(random.below(4) == 0 ? 20 : 4);
    spec.k = 8 + 8 * random.below(random.below(4) == 0 ? 20 : 4);
    if (spec.h + 2 * spec.padding < spec.kernel || spec.w + 2 * spec.padding < spec.kernel ||
        spec.n * spec.shape().out_h * spec.shape().out_w == 1) {
      continue;
    }
    check(spec);
  }
}

}  // namespace conv_pass_tests
