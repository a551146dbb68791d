// One parameter's share of an optimizer step: pointers and layout, no torch. Filled by ops/, read
// by cpu/ and cuda/.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../math/dtype.h"

namespace braze {

struct Operand {
  void* data = nullptr;              // null: this operand is absent
  const int64_t* strides = nullptr;  // [ndim], in elements; read only when the work is not linear
  DType dtype = DType::f32;
};

constexpr int kMaxStates = 3;
constexpr int kMaxDims = 64;  // torch allows 64 dimensions

struct TensorWork {
  int64_t numel = 0;
  const int64_t* sizes = nullptr;  // [ndim]; read only when not linear
  int32_t ndim = 0;
  int32_t hyper = 0;           // index into the step's hyper-parameter table
  bool linear = true;          // every operand is dense in one common order: element i is data[i]
  bool is_double = false;      // arithmetic in double instead of float
  bool first = false;          // momentum buffer or accumulator holds nothing yet: overwrite it
  bool first_average = false;  // `average` holds nothing yet
  Operand param, grad;
  Operand sum;   // fp32/fp64 gradient accumulator that joins grad
  Operand step;  // one-element step count in device memory; absent where the host counts
  Operand state[kMaxStates];  // in the order of the rule
  Operand average;            // running average of the parameter, fp32 or fp64
};

// The hyper-parameters of one launch, whatever the rule: Hyper<Rule>[count] of hyper.h, or
// DeviceHyper<Rule>[count].
struct Hypers {
  int rule = 0;  // its index in Rules
  bool on_device = false;
  const void* data = nullptr;
  size_t count = 0;
  double average_weight = 0;  // of the new parameter in its running average
};

}  // namespace braze
