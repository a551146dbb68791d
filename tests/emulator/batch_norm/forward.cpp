#include <cmath>
#include <cstring>

#include "norm.h"

namespace norm {

using namespace harness;

namespace {

int64_t mask_byte(const Spec& s, int64_t i) {
  const int64_t row = s.channels_last ? s.c : s.spatial;
  return i / row * ((row + 7) / 8) + i % row / 8;
}
int mask_bit(const Spec& s, int64_t i) {
  return static_cast<int>(i % (s.channels_last ? s.c : s.spatial) % 8);
}

}  // namespace

bool Problem::check_statistics() {
  for (int k = 0; k < spec.inputs; ++k) {
    const Running before = running(k);
    const StatisticsArgs args = statistics_args(k);
    const Memory memory = memory_for(args);
    if (!CHECK_OK(cuda::batch_norm_statistics(args, memory.scratch, nullptr))) return false;
    CHECK_OK(cudaDeviceSynchronize());
    memory.check();
    if (!check_stats(k, before)) return false;
  }
  return true;
}

// With running statistics, of which the kernel makes the very stats of the reference.
bool Problem::apply_running() {
  RunningApplyArgs args;
  static_cast<ApplyArgs&>(args) = apply_args();
  std::vector<char> stats_wanted[2];
  for (int k = 0; k < spec.inputs; ++k) {
    stats_wanted[k] = stats[k].bytes();
    stats[k].zero();
    args.channels[k] = channels(k);
    args.stats[k] = stats[k].data();
  }
  if (!CHECK_OK(cuda::batch_norm_apply(args, nullptr))) return false;
  CHECK_OK(cudaDeviceSynchronize());
  for (int k = 0; k < spec.inputs; ++k) {
    if (!CHECK(stats[k].bytes() == stats_wanted[k])) return false;
  }
  return true;
}

bool Problem::check_apply() {
  if (!spec.training) set_stats();
  std::vector<double> wanted(static_cast<size_t>(spec.n * spec.c * spec.spatial));
  std::vector<bool> bits(wanted.size());
  const double unit = rounding(spec.dtype), error = spec.dtype == DType::f64 ? 1e-14 : 2e-6;
  for_each(spec, [&](int64_t i, int64_t c) {
    const auto at = static_cast<size_t>(i);
    wanted[at] = activate(spec.activation, z(i, c), spec.parameter);
    bits[at] = is_upper(i, c);
  });
  if (spec.mask) memset(mask.data(), 0xff, static_cast<size_t>(spec.shape().mask_bytes()));
  if (spec.training) {
    if (!CHECK_OK(cuda::batch_norm_apply(apply_args(), nullptr))) return false;
    CHECK_OK(cudaDeviceSynchronize());
  } else if (!apply_running()) {
    return false;
  }
  const Array& out = spec.in_place ? x[0] : y;
  const auto* bytes = static_cast<const uint8_t*>(mask.data());
  std::vector<uint8_t> expected(static_cast<size_t>(spec.shape().mask_bytes()));
  bool good = true;
  for_each(spec, [&](int64_t i, int64_t) {
    const auto at = static_cast<size_t>(i);
    const double want = wanted[at];
    // 6e-8: half of fp16's least number.
    good = good && CHECK(near(out.get(i), want, 1.001 * unit * std::fabs(want) + 6e-8 + error));
    expected[static_cast<size_t>(mask_byte(spec, i))] |=
        static_cast<uint8_t>(bits[at] << mask_bit(spec, i));
  });
  for (size_t i = 0; spec.mask && good && i < expected.size(); ++i) {
    good = CHECK(bytes[i] == expected[i]);
  }
  return good;
}

}  // namespace norm
