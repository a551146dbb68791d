// Dropout's kernels against its formulas, element by element: every step, dtype, mask, length and
// misalignment.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "cuda/dropout_launch.h"
#include "harness.h"

namespace dropout_tests {

using namespace harness;
using namespace braze;

namespace {

constexpr DType kAll[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

size_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Device memory of exactly this size, so that the next byte is nobody's.
class Memory {
 public:
  Memory(int64_t elements, DType dtype, int64_t phase = 0)
      : dtype_(dtype), phase_(phase), elements_(elements) {
    CHECK_OK(cudaMalloc(&memory_, static_cast<size_t>(elements + phase) * bytes_of(dtype)));
  }
  ~Memory() { (void)cudaFree(memory_); }
  Memory(const Memory&) = delete;
  char* data() const { return static_cast<char*>(memory_) + static_cast<size_t>(phase_) * size(); }
  size_t size() const { return bytes_of(dtype_); }

  double get(int64_t i) const { return read(data(), i, dtype_); }
  void set(int64_t i, double value) const {
    char* to = data() + static_cast<size_t>(i) * size();
    switch (dtype_) {
      case DType::f32: to_storage(static_cast<float>(value), *reinterpret_cast<float*>(to)); break;
      case DType::f64: to_storage(value, *reinterpret_cast<double*>(to)); break;
      case DType::bf16: to_storage(static_cast<float>(value), *reinterpret_cast<Bf16*>(to)); break;
      case DType::f16: to_storage(static_cast<float>(value), *reinterpret_cast<F16*>(to)); break;
    }
  }
  void fill(Random& random) const {
    for (int64_t i = 0; i < elements_; ++i) set(i, 8 * random.uniform() - 4);
  }
  static double read(const char* data, int64_t i, DType dtype) {
    const char* from = data + static_cast<size_t>(i) * bytes_of(dtype);
    switch (dtype) {
      case DType::f32: return *reinterpret_cast<const float*>(from);
      case DType::f64: return *reinterpret_cast<const double*>(from);
      case DType::bf16: return from_storage(*reinterpret_cast<const Bf16*>(from));
      default: return from_storage(*reinterpret_cast<const F16*>(from));
    }
  }

 private:
  DType dtype_;
  int64_t phase_, elements_;
  void* memory_ = nullptr;
};

int64_t mask_index(const DropoutMask& mask, int64_t i) {
  if (mask.kind == DropoutMask::element) return i;
  if (mask.kind == DropoutMask::row) return i / mask.spatial;
  return i / (mask.spatial * mask.channels) * mask.channels + i % mask.channels;
}

template <Activation kA, class T>
T activated(const DropoutArgs& a, bool kept, T x, T second) {
  const T scale = static_cast<T>(a.terms.scale), parameter = static_cast<T>(a.parameter);
  if (a.step == DropoutStep::activate) return activate_and_drop<kA>(kept, x, parameter, scale);
  if constexpr (kA == Activation::relu) return relu_and_drop_grad(x, second, scale);
  return activate_and_drop_grad<kA>(kept, x, second, parameter, scale);
}

template <class T>
T expected(const DropoutArgs& a, bool kept, T x, T second) {
  if (a.step == DropoutStep::scale) return drop(kept, x, round_terms<T>(a.terms));
  if (a.step == DropoutStep::add) {
    return drop_and_add(kept, x, second, static_cast<T>(a.terms.scale));
  }
  if (a.activation == Activation::relu) return activated<Activation::relu>(a, kept, x, second);
  if (a.activation == Activation::silu) return activated<Activation::silu>(a, kept, x, second);
  return activated<Activation::leaky_relu>(a, kept, x, second);
}

double expected_element(const DropoutArgs& a, const RandomState& random, int64_t i, double x,
                        double second) {
  const auto index = static_cast<uint64_t>(mask_index(a.mask, i));
  const RandomLanes lanes =
      random_lanes(random.seed, random.offset, index / static_cast<uint64_t>(kLanesPerBlock));
  const bool kept = is_kept(lanes.lane(static_cast<int>(index % kLanesPerBlock)), a.threshold);
  if (a.dtype == DType::f64) return expected<double>(a, kept, x, second);
  const float value = expected<float>(a, kept, static_cast<float>(x), static_cast<float>(second));
  if (a.dtype == DType::f32) return value;
  if (a.dtype == DType::bf16) return float_from_bf16(bf16_from_float(value));
  return float_from_f16(f16_from_float(value));
}

DropoutArgs make_args(DropoutStep step, DType dtype, int64_t numel, double p) {
  DropoutArgs a;
  a.step = step;
  a.dtype = dtype;
  a.numel = numel;
  a.threshold = dropout_threshold(p);
  a.terms = dropout_terms(a.threshold);
  a.activation = Activation::leaky_relu;
  a.parameter = 0.125;
  a.random.seed = 0x0123456789abcdefu + seed();
  a.random.offset = (uint64_t{3} << 33) + 5;
  return a;
}

// Runs `a` on random data, phases: elements by which x, second and out are off 16 bytes.
void check_run(DropoutArgs a, int64_t x_phase, int64_t second_phase, int64_t out_phase) {
  Case note("step %d, dtype %d, %lld elements, phases %lld %lld %lld, mask %d",
            static_cast<int>(a.step), static_cast<int>(a.dtype), static_cast<long long>(a.numel),
            static_cast<long long>(x_phase), static_cast<long long>(second_phase),
            static_cast<long long>(out_phase), static_cast<int>(a.mask.kind));
  Random random(seed() + static_cast<uint64_t>(a.numel));
  const Memory x(a.numel, a.dtype, x_phase), second(a.numel, a.dtype, second_phase);
  const Memory out(a.numel, a.dtype, out_phase), used(2, DType::f64);
  x.fill(random);
  const bool two = a.step == DropoutStep::add || a.step == DropoutStep::activate_grad;
  if (two) second.fill(random);
  a.x = x.data();
  a.second = two ? second.data() : nullptr;
  a.out = out.data();
  a.used = reinterpret_cast<int64_t*>(used.data());
  CHECK_OK(cuda::dropout(a, nullptr));
  CHECK_OK(cudaDeviceSynchronize());
  const RandomState state = a.random.read();
  CHECK(a.used[0] == static_cast<int64_t>(state.seed));
  CHECK(a.used[1] == static_cast<int64_t>(state.offset));
  for (int64_t i = 0; i < a.numel; ++i) {
    const double want = expected_element(a, state, i, x.get(i), two ? second.get(i) : 0);
    if (!CHECK(memcmp(&want, std::array{out.get(i)}.data(), sizeof(want)) == 0)) return;
  }
}

}  // namespace

TEST(dropout_philox_known_answers) {
  const struct {
    uint32_t counter[4];
    uint32_t key[2];
    uint32_t seven[4], ten[4];
  } known[] = {
      {{0, 0, 0, 0},
       {0, 0},
       {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48},
       {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& k : known) {
    uint32_t seven[4], ten[4];
    memcpy(seven, k.counter, sizeof(seven));
    memcpy(ten, k.counter, sizeof(ten));
    philox4x32<7, OneCounter>(seven, k.key[0], k.key[1]);
    philox4x32<10, OneCounter>(ten, k.key[0], k.key[1]);
    for (int i = 0; i < 4; ++i) {
      CHECK(seven[i] == k.seven[i]);
      CHECK(ten[i] == k.ten[i]);
    }
  }
}

TEST(dropout_steps) {
  std::vector<int64_t> lengths = {0, 1, 9, 255, 256, 257, 8193};
  if (!small()) lengths.insert(lengths.end(), {2, 7, 8, 511, 513, 2048, 8191, 8192, 16385});
  for (const DType dtype : kAll) {
    for (const DropoutStep step : {DropoutStep::scale, DropoutStep::add, DropoutStep::activate,
                                   DropoutStep::activate_grad}) {
      for (const int64_t numel : lengths) {
        const DropoutArgs a = make_args(step, dtype, numel, 0.375);
        check_run(a, 0, 0, 0);
        if (small() && numel > 300) continue;
        check_run(a, 1, 0, 0);
        check_run(a, 0, 1, 0);
        check_run(a, 0, 0, 3);
        check_run(a, 1, 1, 1);
      }
    }
  }
}

TEST(dropout_activations) {
  for (const DType dtype : kAll) {
    for (const DropoutStep step : {DropoutStep::activate, DropoutStep::activate_grad}) {
      for (const Activation activation : {Activation::relu, Activation::silu}) {
        if (dtype == DType::f64 && activation == Activation::silu) continue;
        DropoutArgs a = make_args(step, dtype, 600, 0.5);
        a.activation = activation;
        check_run(a, 0, 0, 0);
      }
    }
  }
}

TEST(dropout_channels) {
  const int64_t shapes[][3] = {{2, 3, 200}, {3, 5, 7}, {2, 1, 33}, {2, 17, 16},
                               {1, 700, 3}, {5, 8, 1}, {1, 1, 9},  {2, 9, 1000}};
  for (const DType dtype : kAll) {
    for (const auto& [n, c, s] : shapes) {
      if (small() && n * c * s > 2000) continue;
      for (const auto kind : {DropoutMask::row, DropoutMask::channels_last}) {
        DropoutArgs a = make_args(DropoutStep::scale, dtype, n * c * s, 0.375);
        a.terms = alpha_dropout_terms(a.threshold);
        a.mask = {kind, c, s};
        check_run(a, 0, 0, 0);
        check_run(a, 1, 0, 0);
      }
    }
  }
}

TEST(dropout_thresholds) {
  for (const double p : {0.0, 1e-6, 1 / 65536.0, 0.5, 65535 / 65536.0, 1.0}) {
    check_run(make_args(DropoutStep::scale, DType::f32, 700, p), 0, 0, 0);
    check_run(make_args(DropoutStep::add, DType::bf16, 700, p), 0, 0, 0);
  }
}

// Seed and offset in device memory, as a captured graph has them.
TEST(dropout_state_in_memory) {
  const Memory state(2, DType::f64);
  auto* numbers = reinterpret_cast<int64_t*>(state.data());
  numbers[0] = -123456789012345;
  numbers[1] = int64_t{1} << 34;
  DropoutArgs a = make_args(DropoutStep::scale, DType::f32, 3000, 0.5);
  a.random.seed_pointer = numbers;
  a.random.offset_pointer = numbers + 1;
  CHECK(a.random.read().seed == static_cast<uint64_t>(numbers[0]));
  CHECK(a.random.read().offset == (uint64_t{3} << 33) + 5 + (uint64_t{1} << 34));
  check_run(a, 0, 0, 0);
}

// Only the last blocks of a tensor that does not exist in front of them.
TEST(dropout_large) {
  for (const int64_t numel : {(int64_t{1} << 31) + 12345, (int64_t{1} << 35) + 5}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const int64_t channels : {int64_t{0}, int64_t{3}}) {
        Case note("%lld elements of dtype %d", static_cast<long long>(numel),
                  static_cast<int>(dtype));
        const size_t bytes = static_cast<size_t>(numel) * bytes_of(dtype);
        auto* memory = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (!CHECK(memory != MAP_FAILED)) return;
        DropoutArgs a = make_args(DropoutStep::add, dtype, numel, 0.375);
        if (channels != 0) {
          a.step = DropoutStep::scale;
          a.terms = alpha_dropout_terms(a.threshold);
          a.mask = {DropoutMask::channels_last, channels, numel / 3 + 1};
        }
        a.x = a.second = a.out = memory;
        if (channels != 0) a.second = nullptr;
        const int64_t first = std::max<int64_t>(numel - 9000, 0), blocks = (numel + 8191) / 8192;
        for (int64_t i = first; i < numel; ++i) {
          const uint16_t bits = static_cast<uint16_t>(0x3f80 + i % 100);
          if (dtype == DType::bf16) memcpy(memory + 2 * i, &bits, 2);
          if (dtype == DType::f32) memcpy(memory + 4 * i + 2, &bits, 2);
        }
        emulator::set_block_range(static_cast<uint64_t>(blocks - 1), static_cast<uint64_t>(blocks));
        CHECK_OK(cuda::dropout(a, nullptr));
        CHECK_OK(cudaDeviceSynchronize());
        emulator::clear_block_range();
        for (int64_t i = (blocks - 1) * 8192; i < numel; ++i) {
          const double x = float_from_bf16(static_cast<uint16_t>(0x3f80 + i % 100));
          const double want = expected_element(a, a.random, i, x, x);
          if (!CHECK(Memory::read(memory, i, dtype) == want)) break;
        }
        munmap(memory, bytes);
      }
    }
  }
}

// A control: an output that is one element short. ASan must see it.
TEST(seeded_dropout_short_output) {
  const Memory x(300, DType::f32), out(299, DType::f32);
  Random random(seed());
  x.fill(random);
  DropoutArgs a = make_args(DropoutStep::scale, DType::f32, 300, 0.375);
  a.x = x.data();
  a.out = out.data();
  CHECK_OK(cuda::dropout(a, nullptr));
  CHECK_OK(cudaDeviceSynchronize());
}

// A control: an input that nobody has written. MSan must see it.
TEST(seeded_dropout_fresh_input) {
  const Memory x(300, DType::f32), out(300, DType::f32);
  DropoutArgs a = make_args(DropoutStep::activate, DType::f32, 300, 0.375);
  a.x = x.data();
  a.out = out.data();
  CHECK_OK(cuda::dropout(a, nullptr));
  CHECK_OK(cudaDeviceSynchronize());
  int positive = 0;
  for (int64_t i = 0; i < 300; ++i) {
    if (out.get(i) > 0) ++positive;
  }
  CHECK(positive < 0);
}

// A control: two tensors in one place, the second behind the first by a block. TSan must see it.
TEST(seeded_dropout_overlap) {
  const Memory both(16384 + 8192, DType::f32);
  Random random(seed());
  both.fill(random);
  DropoutArgs a = make_args(DropoutStep::scale, DType::f32, 16384, 0.375);
  a.x = both.data();
  a.out = both.data() + 8192 * 4;
  CHECK_OK(cuda::dropout(a, nullptr));
  CHECK_OK(cudaDeviceSynchronize());
}

}  // namespace dropout_tests
