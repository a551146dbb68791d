#include <cmath>
#include <cstring>

#include "norm.h"

namespace norm {

using namespace harness;

// Needs stats, and x as it was.
bool Problem::check_backward() {
  const int64_t numel = spec.n * spec.c * spec.spatial,
                row = spec.channels_last ? spec.c : spec.spatial;
  // A curved derivative may cancel.
  std::vector<double> d(static_cast<size_t>(numel)), d_size(static_cast<size_t>(numel));
  if (spec.mask) memset(mask.data(), 0, static_cast<size_t>(spec.shape().mask_bytes()));
  for (int64_t i = 0; i < numel; ++i) {
    const int64_t c = channel_of(i);
    double slope;
    if (two_slopes(spec.activation)) {
      const bool high = is_upper(i, c);
      slope = slope_of(high);
      if (spec.mask && high) {
        static_cast<uint8_t*>(mask.data())[i / row * ((row + 7) / 8) + i % row / 8] |=
            static_cast<uint8_t>(1u << (i % row % 8));
      }
    } else {
      slope = derivative(spec.activation, z(i, c), spec.parameter);
    }
    const double gradient = dy.get(i) + (spec.dy2 ? dy2.get(i) : 0);
    d[static_cast<size_t>(i)] = gradient * slope;
    d_size[static_cast<size_t>(i)] =
        std::fabs(two_slopes(spec.activation) ? gradient * slope : gradient);
  }

  const BackwardArgs args = backward_args();
  const Memory memory = memory_for(args);
  if (!CHECK_OK(cuda::batch_norm_reduce(args, memory.scratch, nullptr))) return false;
  CHECK_OK(cudaDeviceSynchronize());
  memory.check();
  if (!CHECK_OK(cuda::batch_norm_apply_grad(args, nullptr))) return false;
  CHECK_OK(cudaDeviceSynchronize());

  const double unit = sum_error(spec.dtype);
  const auto channels = static_cast<size_t>(spec.c);
  for (int k = 0; k < spec.inputs; ++k) {
    const std::vector<ChannelSums> all = sums_of(k, d, d_size);
    if (!check_gradients(k, all)) return false;
    const Array& out = spec.in_place && k == 0 ? dy : dx[k];
    std::vector<double> on_input(channels), constant(channels);
    for (size_t c = 0; c < channels; ++c) {
      const auto channel = static_cast<int64_t>(c);
      const double invstd = stat(k, kInvstd, channel), scale = stat(k, kScale, channel);
      if (k == 0 &&
          (!CHECK(near(sums.get(channel), all[c].grad, unit * all[c].grad_size)) ||
           !CHECK(near(sums.get(spec.c + channel), all[c].grad_input, unit * all[c].input_size)))) {
        return false;
      }
      if (!spec.training || numel == 0) continue;
      on_input[c] = -scale * invstd * invstd * all[c].grad_input / args.count;
      constant[c] = -scale * all[c].grad / args.count;
    }
    for (int64_t i = 0; i < numel; ++i) {
      const int64_t channel = channel_of(i);
      const auto c = static_cast<size_t>(channel);
      const double mean = stat(k, kMean, channel) + stat(k, kMeanLow, channel);
      const double parts[] = {d[static_cast<size_t>(i)] * stat(k, kScale, channel),
                              (x[k].get(i) - mean) * on_input[c], constant[c]};
      const double want = parts[0] + parts[1] + parts[2];
      const double size = d_size[static_cast<size_t>(i)] * std::fabs(stat(k, kScale, channel)) +
                          std::fabs(parts[1]) + std::fabs(parts[2]);
      const double slack = spec.training ? unit * all[c].grad_size / args.count : 0;
      if (!CHECK(
              near(out.get(i), want,
                   1.001 * rounding(spec.dtype) * std::fabs(want) + unit * size + slack + 6e-8))) {
        return false;
      }
    }
  }
  for (int64_t i = 0; spec.residual && i < numel; ++i) {
    const double want = d[static_cast<size_t>(i)];
    if (!CHECK(near(grad_residual.get(i), want,
                    1.001 * rounding(spec.dtype) * std::fabs(want) +
                        unit * d_size[static_cast<size_t>(i)] + 6e-8))) {
      return false;
    }
  }
  return true;
}

// In the order of a training step. In place, each pass starts from what it needs.
bool Problem::check_all() {
  const Case note("%s", describe(spec));
  if (spec.training && !check_statistics()) return false;
  if (!spec.in_place) return check_apply() && check_backward();
  if (!check_apply()) return false;
  Spec again = spec;
  Problem fresh(again);
  fresh.set_stats();
  return fresh.check_backward();
}

std::vector<char> Problem::results() const {
  std::vector<char> all;
  const auto add = [&](const Array& array) {
    const std::vector<char> bytes = array.bytes();
    all.insert(all.end(), bytes.begin(), bytes.end());
  };
  for (int k = 0; k < spec.inputs; ++k) {
    for (const Array* array : {&stats[k], &running_mean[k], &running_var[k], &tracked[k],
                               &coefficients[k], &grad_weight[k], &grad_bias[k], &dx[k]}) {
      add(*array);
    }
  }
  for (const Array* array : {&y, &sums, &dy}) add(*array);
  return all;
}

}  // namespace norm
