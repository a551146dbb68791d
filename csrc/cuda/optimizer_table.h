// What one optimizer launch reads: a table of all tensors, in the launch's 32 KB argument as far as
// it fits, the rest in device memory. Plain structs, the same on host and device.
#pragma once
#include <cstdint>

#include "../plan/hyper.h"

namespace braze::cuda {

// Elements of one chunk; a block works on one chunk at a time.
constexpr int64_t kChunkElements = 8192;
constexpr int kBlockThreads = 256;

enum Column : int { kParam, kGrad, kSum, kState0, kState1, kState2, kAverage, kNumColumns };

// What stays as it is from step to step.
struct TensorEntry {
  void* data[kNumColumns];  // null: absent; kGrad is in TensorNow
  void* step;               // step count in device memory, one element, or null
  int64_t numel;
  int32_t first_chunk;  // chunks of all tensors before this one
  int32_t dims;  // where in the table's dims: [ndim] sizes, [column][ndim] strides; -1: linear
  int32_t ndim;
  uint16_t dtypes;  // 2 bits per column, kGrad's in TensorNow
  uint8_t step_is_double;
  uint8_t is_double;  // arithmetic in double
};

// What changes from step to step.
struct TensorNow {
  const void* grad;
  uint32_t hyper;  // byte offset among the hypers of its arithmetic
  uint32_t flags;
};

// In TensorNow::flags, above all of Flag.
constexpr int kGradDtypeShift = 8;            // 2 bits
constexpr uint32_t kFirstAverage = 1u << 10;  // the average holds nothing yet

// What decides a step and is in device memory; each pointer may be null.
struct StepScale {
  const float* grad_scale = nullptr;  // gradients are divided by it
  const float* found_inf = nullptr;   // not 0: the step does nothing
  const double* squares = nullptr;    // [num_squares] of the gradients' squares
  int32_t num_squares = 0;
  bool skip_overflow = false;  // squares that are not finite: the step does nothing
  double norm_scale = 1;       // the norm is sqrt(all squares) * norm_scale / grad_scale
  double max_norm = -1;        // >= 0: gradients are clipped to it
  double* sums = nullptr;      // [SumColumn][all chunks]: measure()'s, and statistics of a step
};

// GradientSums of each chunk, by columns.
enum SumColumn : int {
  kSquares,
  kLargest,
  kZeros,
  kNonFinite,
  kUpdateSquares,
  kParamSquares,
  kSumColumns
};

// What measure() finds of a device's gradients.
struct MeasuredTotals {
  double squares;
  float norm;
  float found_inf;  // 1 if squares are not finite, else 0
};

// Set in an offset: the bytes are in device memory, not in the argument.
constexpr uint32_t kResident = 1u << 31;
constexpr int kArgumentBytes = 32 * 1024 - 256;

template <int kBytes>
struct alignas(16) StepArgumentOf {
  const char* resident;  // device memory
  int64_t chunk_begin, chunk_end;
  StepScale scale;
  unsigned int* blocks_done;  // counter in device memory, 0 before and after; null where no step
                              // count is to advance
  int64_t all_chunks;         // of the whole list
  double average_weight;
  float narrow_average_weight;
  int32_t num_tensors;
  uint32_t hypers, wide_hypers, now, entries, dims;  // offsets of the sections
  // Where the sections begin, for launches over part of the tensors: entries count from the list's
  // first.
  uint32_t hypers_begin, wide_hypers_begin;  // bytes
  int32_t dims_begin;                        // elements
  // Of measure() alone.
  uint32_t measured_blocks;              // of all its launches
  int64_t measured_begin, measured_end;  // all their chunks
  double weight;                         // what gradients are multiplied by
  MeasuredTotals* totals;
  alignas(16) char bytes[kBytes];
};
using StepArgument = StepArgumentOf<kArgumentBytes>;
// The beginning of a StepArgument: all that a launch over few tensors has to copy.
using SmallStepArgument = StepArgumentOf<3904>;
static_assert(sizeof(StepArgument) <= 32764, "CUDA limits a launch's parameters to 32,764 bytes");
static_assert(sizeof(SmallStepArgument) <= 4096);

}  // namespace braze::cuda
