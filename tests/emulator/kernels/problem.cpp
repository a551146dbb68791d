#include "problem.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cpu/optimizer_cpu.h"
#include "math/convert.h"
#include "math/gradient.h"

namespace harness {
namespace {

using braze::Operand;
using namespace braze::cuda;

constexpr const char* kNames[kNumColumns] = {"param",  "grad",   "sum",    "state0",
                                             "state1", "state2", "average"};

DType dtype_of(const Spec& spec, int column) {
  return column == kParam     ? spec.param
         : column == kGrad    ? spec.grad
         : column == kSum     ? spec.sum
         : column == kAverage ? spec.param == DType::f64 ? DType::f64 : DType::f32
                              : spec.state;
}

int64_t extent(const Spec& spec, int column, int64_t numel) {
  if (spec.strides[column].empty() || numel == 0) return numel;
  int64_t last = 0;
  for (size_t d = 0; d < spec.sizes.size(); ++d) {
    last += (spec.sizes[d] - 1) * spec.strides[column][d];
  }
  return last + 1;
}

}  // namespace

void put(char* at, DType dtype, double value) {
  if (dtype == DType::f64) {
    memcpy(at, &value, sizeof(value));
  } else if (dtype == DType::f32) {
    const float narrow = static_cast<float>(value);
    memcpy(at, &narrow, sizeof(narrow));
  } else {
    const float narrow = static_cast<float>(value);
    const uint16_t bits =
        dtype == DType::bf16 ? braze::bf16_from_float(narrow) : braze::f16_from_float(narrow);
    memcpy(at, &bits, sizeof(bits));
  }
}

double get(const char* at, DType dtype) {
  if (dtype == DType::f64) {
    double value;
    memcpy(&value, at, sizeof(value));
    return value;
  }
  if (dtype == DType::f32) {
    float value;
    memcpy(&value, at, sizeof(value));
    return value;
  }
  uint16_t bits;
  memcpy(&bits, at, sizeof(bits));
  return dtype == DType::bf16 ? braze::float_from_bf16(bits) : braze::float_from_f16(bits);
}

size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

Buffer::Buffer(DType dtype, int64_t elements, int front)
    : bytes_((static_cast<size_t>(elements) + static_cast<size_t>(front)) * size_of(dtype)),
      front_(static_cast<size_t>(front) * size_of(dtype)),
      dtype_(dtype) {
  void* memory = nullptr;
  // A tensor without elements has an address as well.
  if (posix_memalign(&memory, 64, std::max<size_t>(bytes_, 1)) != 0) abort();
  memory_.reset(static_cast<char*>(memory));
}

void fill(Buffer& buffer, Random& random, bool positive) {
  constexpr double kSpecial[] = {0.0, -0.0, 1e-41, 3e4, 1e-7, HUGE_VAL};
  const size_t size = size_of(buffer.dtype());
  for (size_t i = 0; i < buffer.bytes(); i += size) {
    double value = random.uniform() * 4 - 2;
    if (random.below(32) == 0) value = kSpecial[random.below(6)];
    put(buffer.memory() + i, buffer.dtype(), positive ? std::fabs(value) : value);
  }
}

bool same(const Buffer& one, const Buffer& other, std::string& difference) {
  if (memcmp(one.memory(), other.memory(), one.bytes()) == 0) return true;
  const size_t size = size_of(one.dtype());
  for (size_t i = 0; i < one.bytes(); i += size) {
    if (memcmp(one.memory() + i, other.memory() + i, size) == 0) continue;
    const double a = get(one.memory() + i, one.dtype()), b = get(other.memory() + i, one.dtype());
    if (std::isnan(a) && std::isnan(b)) continue;
    char text[160];
    const auto place = static_cast<long long>(i) - (one.data() - one.memory());
    snprintf(text, sizeof(text), "element %lld of %zu is %.17g instead of %.17g",
             place / static_cast<long long>(size), one.bytes() / size, a, b);
    difference = text;
    return false;
  }
  return true;
}

// A state of squares, which has no negative numbers.
static bool is_square(int rule, int state) {
  bool square = false;
  braze::Rules::visit(rule, [&]<class Rule>(Rule) {
    square =
        state >= 0 && state < Rule::kStates && strstr(Rule::kStateNames[state], "sq") != nullptr;
  });
  return square;
}

Problem::Problem(int rule, std::vector<Spec> specs, std::vector<uint32_t> states, uint64_t salt)
    : specs_(std::move(specs)) {
  Random random(seed() * 1000 + salt);
  device.resize(specs_.size());
  for (size_t i = 0; i < specs_.size(); ++i) {
    const Spec& spec = specs_[i];
    TensorWork& work = device[i];
    work.numel = 1;
    for (const int64_t size : spec.sizes) work.numel *= size;
    work.sizes = spec.sizes.data();
    work.ndim = static_cast<int32_t>(spec.sizes.size());
    work.hyper = spec.hyper;
    work.linear = spec.strides[kParam].empty();
    work.is_double = spec.param == DType::f64;
    work.first = spec.first;
    work.first_average = spec.first_average;
    if (spec.step >= 0) {
      steps_.push_back(std::make_unique<double>());
      work.step = {steps_.back().get(), nullptr, spec.step_is_double ? DType::f64 : DType::f32};
      put(static_cast<char*>(work.step.data), work.step.dtype, spec.step);
    }
  }
  host = device;
  for (size_t i = 0; i < specs_.size(); ++i) {
    const Spec& spec = specs_[i];
    const uint32_t used = states[static_cast<size_t>(spec.hyper)];
    for (int c = 0; c < kNumColumns; ++c) {
      const bool present = c == kGrad      ? spec.has_grad
                           : c == kSum     ? spec.has_sum
                           : c == kAverage ? spec.has_average
                                           : c < kState0 || (used >> (c - kState0) & 1);
      if (!present) continue;
      const DType dtype = dtype_of(spec, c);
      const int64_t elements = extent(spec, c, device[i].numel);
      Column column = {i, kNames[c], Buffer(dtype, elements, spec.phase[c]),
                       Buffer(dtype, elements, spec.phase[c])};
      // A first buffer holds nothing yet: its old content must not matter.
      fill(column.device, random, is_square(rule, c - kState0));
      memcpy(column.host.memory(), column.device.memory(), column.device.bytes());
      for (TensorWork* work : {&device[i], &host[i]}) {
        Operand& operand = c == kParam     ? work->param
                           : c == kGrad    ? work->grad
                           : c == kSum     ? work->sum
                           : c == kAverage ? work->average
                                           : work->state[c - kState0];
        operand.data = work == &device[i] ? column.device.data() : column.host.data();
        operand.dtype = dtype;
        if (!spec.strides[c].empty()) operand.strides = spec.strides[c].data();
      }
      columns_.push_back(std::move(column));
    }
    for (TensorWork* work : {&device[i], &host[i]}) {
      for (Operand* operand : {&work->param, &work->grad, &work->sum}) {
        if (operand->data == nullptr) operand->dtype = spec.param;
      }
    }
  }
}

double Problem::step_of(size_t tensor) const {
  const Operand& step = device[tensor].step;
  return get(static_cast<const char*>(step.data), step.dtype);
}

void Problem::set_first(bool first) {
  for (TensorWork& work : device) work.first = first;
  for (TensorWork& work : host) work.first = first;
}

void Problem::set_first_average(bool first) {
  for (TensorWork& work : device) work.first_average = first;
  for (TensorWork& work : host) work.first_average = first;
}

void Problem::equalize() {
  for (Column& column : columns_) {
    memcpy(column.host.memory(), column.device.memory(), column.device.bytes());
  }
}

bool Problem::untouched() const {
  for (const Column& column : columns_) {
    if (memcmp(column.host.memory(), column.device.memory(), column.device.bytes()) != 0) {
      return false;
    }
  }
  return true;
}

bool Problem::check(const char* file, int line) const {
  for (const Column& column : columns_) {
    std::string difference;
    if (same(column.device, column.host, difference)) continue;
    const Spec& spec = specs_[column.tensor];
    std::string phases;
    for (const int phase : spec.phase) phases += " " + std::to_string(phase);
    failed(file, line,
           "tensor " + std::to_string(column.tensor) + ", " + column.name + ": " + difference +
               " (phases" + phases + ", dtypes " + std::to_string(static_cast<int>(spec.param)) +
               std::to_string(static_cast<int>(spec.grad)) +
               std::to_string(static_cast<int>(spec.sum)) +
               std::to_string(static_cast<int>(spec.state)) + ")");
    return false;
  }
  return true;
}

double number_for(const std::string& name, const Options& options, int which) {
  const bool decay = options.penalty || options.decoupled;
  if (name == "lr") return 1e-3 * (1 + which % 7);
  if (name == "weight_decay") return decay ? 0.01 * (1 + which % 3) : 0;
  if (name == "l1") return options.penalty ? 1e-3 : 0;
  if (name == "eps") return 1e-8;
  if (name == "momentum") return options.momentum ? 0.9 - 0.1 * (which % 2) : 0;
  if (name == "dampening") return options.nesterov ? 0 : 0.25;
  return name == "weight" ? 0.7 : 0.9;
}

bool flag_for(const std::string& name, const Options& options, int which) {
  return name == "maximize"                 ? which % 5 == 4
         : name == "amsgrad"                ? options.amsgrad
         : name == "nesterov"               ? options.nesterov
         : name == "decoupled_weight_decay" ? options.decoupled
                                            : options.centered;
}

int64_t place_of(const TensorWork& work, const Operand& operand, int64_t element) {
  if (work.linear) return element;
  int64_t place = 0;
  for (int d = work.ndim - 1; d >= 0; --d) {
    place += element % work.sizes[d] * operand.strides[d];
    element /= work.sizes[d];
  }
  return place;
}

static char* address(const TensorWork& work, const Operand& operand, int64_t element) {
  return static_cast<char*>(operand.data) +
         place_of(work, operand, element) * static_cast<int64_t>(size_of(operand.dtype));
}

double value_of(const TensorWork& work, const Operand& operand, int64_t element) {
  return get(address(work, operand, element), operand.dtype);
}

void reference(Problem& problem, const braze::Hypers& hypers) {
  // Averages have a loop of their own.
  std::vector<TensorWork> without = problem.host;
  for (TensorWork& work : without) work.average = {};
  braze::ChunkList chunks;
  chunks.build(without);
  braze::cpu::update_tensors(without, chunks, hypers, 1);
  for (const TensorWork& work : problem.host) {
    for (int64_t i = 0; work.average.data != nullptr && i < work.numel; ++i) {
      const double p = value_of(work, work.param, i), old = value_of(work, work.average, i);
      const auto narrow = [](double value) { return static_cast<float>(value); };
      const double mixed = work.is_double ? braze::average_with(old, p, hypers.average_weight)
                                          : braze::average_with(narrow(old), narrow(p),
                                                                narrow(hypers.average_weight));
      put(address(work, work.average, i), work.average.dtype, work.first_average ? p : mixed);
    }
  }
}

const std::vector<int64_t>& lengths() {
  static const std::vector<int64_t> full = {0,    1,    2,    3,    4,    5,    7,     8,
                                            9,    15,   16,   17,   31,   33,   255,   257,
                                            1023, 1025, 8185, 8191, 8192, 8193, 16384, 16385};
  static const std::vector<int64_t> few = {0, 1, 5, 8, 13, 261, 8203};
  return small() ? few : full;
}

}  // namespace harness
