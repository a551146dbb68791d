// Batch normalisation fused with an activation, as kernels get it: pointers, sizes and flags, no
// torch. Filled by ops/, read by cpu/ and cuda/, which offer the same seven steps:
//
//   statistics    x -> stats (and the running statistics), or x -> moments for another process
//   combine       moments of all processes -> stats (and the running statistics)
//   from_running  running statistics -> stats; a part of apply on a GPU, which saves a launch
//   apply         x, stats [, x2, stats2 | residual] -> y [, mask]
//   reduce        dy [, dy2], x, stats ... -> sums, coefficients, grad_weight, grad_bias
//   coefficients  sums of all processes -> coefficients
//   apply_grad    dy [, dy2], x, stats ..., coefficients -> dx [, dx2 | grad_residual]
#pragma once
#include <cstddef>
#include <cstdint>

#include "../math/activation.h"
#include "tensor_work.h"

namespace braze {

// A dense activation: element (n, c, s) is at ((n * C) + c) * S + s, or, channels last, at
// ((n * S) + s) * C + c. A tensor with S = 1 is channels last, one with C = 1 is not.
struct ActivationShape {
  int64_t n = 0, c = 0, spatial = 0;
  bool channels_last = false;
  DType dtype = DType::f32;

  BRAZE_INLINE int64_t per_channel() const { return n * spatial; }
  BRAZE_INLINE int64_t numel() const { return n * c * spatial; }
  // A bit mask starts a new byte with every row: one pixel of a channels-last tensor, else one
  // plane.
  BRAZE_INLINE int64_t row() const { return channels_last ? c : spatial; }
  BRAZE_INLINE int64_t rows() const { return channels_last ? n * spatial : n * c; }
  BRAZE_INLINE int64_t mask_bytes() const { return rows() * ((row() + 7) / 8); }
};

// The arithmetic type T is double for fp64 tensors, float for all others.

// Rows of the array T stats[kStatsRows][c]: BatchNormStats by field.
enum StatsRow { kMean, kMeanLow, kInvstd, kScale, kShift, kStatsRows };
// Rows of T moments[kMomentsRows][c].
enum MomentsRow { kMomentsMean, kMomentsM2, kMomentsCount, kMomentsRows };
// Rows of T coefficients[kCoefficientRows][c].
enum CoefficientRow { kOnGrad, kOnInput, kConstant, kCoefficientRows };

// The vectors [c] that belong to one normalised tensor.
struct BatchNormChannels {
  const void* weight = nullptr;  // null: 1
  const void* bias = nullptr;    // null: 0
  DType param_dtype = DType::f32;
  void* running_mean = nullptr;  // null: there are none
  void* running_var = nullptr;
  DType running_dtype = DType::f32;
  int64_t* batches_tracked = nullptr;  // one number, counted up wherever running statistics are
  double eps = 1e-5;
  double momentum = 0.1;
  bool cumulative = false;  // momentum is 1 / batches_tracked, after counting up
};

// Training only. `x` may be empty: then the running statistics stay, and batches_tracked counts.
struct StatisticsArgs {
  ActivationShape shape;
  const void* x = nullptr;
  BatchNormChannels channels;
  void* stats = nullptr;
  void* moments = nullptr;  // not null: filled instead of stats, and nothing else is
};

struct CombineArgs {
  ActivationShape shape;          // c and dtype count
  const void* moments = nullptr;  // [processes][kMomentsRows][c], merged in this order
  int64_t processes = 0;
  BatchNormChannels channels;
  void* stats = nullptr;
};

struct FromRunningArgs {
  ActivationShape shape;  // c and dtype count
  BatchNormChannels channels;
  void* stats = nullptr;
};

struct NormalizedInput {
  const void* x = nullptr;
  const void* stats = nullptr;
};

// y = activation(z1 [+ z2 | + residual]).
struct ApplyArgs {
  ActivationShape shape;
  NormalizedInput input[2];        // the second may be absent
  const void* residual = nullptr;  // null: none
  Activation activation = Activation::identity;
  double parameter = 0;
  void* y = nullptr;
  uint8_t* mask = nullptr;  // null: not wanted; else derivative_is_upper of each element
};

// The same of layers that normalise with their running statistics: makes stats first.
struct RunningApplyArgs : ApplyArgs {
  BatchNormChannels channels[2];
  void* stats[2] = {};  // input[k].stats, to be written

  BRAZE_INLINE FromRunningArgs from_running(int k) const { return {shape, channels[k], stats[k]}; }
};

struct InputGradient {
  DType param_dtype = DType::f32;
  void* grad_weight = nullptr;   // [c] of param_dtype; null: not wanted
  void* grad_bias = nullptr;     // [c] of param_dtype; null: not wanted
  void* coefficients = nullptr;  // T[kCoefficientRows][c], from reduce to apply_grad
  void* dx = nullptr;            // null: not wanted
};

// Both passes of the backward. The activation's derivative is of z1 + z2, of z1 + residual, or,
// with a mask, of what the mask says.
struct BackwardArgs {
  ActivationShape shape;
  const void* dy = nullptr;
  const void* dy2 = nullptr;  // a second gradient of y, added in the arithmetic type; null: none
  NormalizedInput input[2];
  InputGradient grad[2];
  const void* residual = nullptr;  // read only without a mask
  const uint8_t* mask = nullptr;
  void* grad_residual = nullptr;  // d; null: not wanted
  Activation activation = Activation::identity;
  double parameter = 0;
  bool batch_statistics = true;  // false: stats were running statistics, constants here
  double count = 0;              // values per channel, of all processes
  void* sums = nullptr;  // T[2][c], BatchNormSums by field, of input[0]: wanted for other processes

  // Whether apply_grad has anything to do.
  BRAZE_INLINE bool writes_elements() const {
    return grad[0].dx != nullptr || grad[1].dx != nullptr || grad_residual != nullptr;
  }
};

// One of the two passes alone.
struct ReduceArgs : BackwardArgs {};
struct ApplyGradArgs : BackwardArgs {};

// What reduce does at its end, from sums that other processes had a part in.
struct CoefficientsArgs {
  ActivationShape shape;  // c and dtype count
  const void* stats = nullptr;
  const void* sums = nullptr;   // T[2][c]
  const void* count = nullptr;  // T, one number in memory of the device: values per channel
  void* coefficients = nullptr;
};

}  // namespace braze
