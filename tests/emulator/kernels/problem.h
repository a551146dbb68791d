// One optimizer step twice: tensors for the kernels, and an identical copy for the CPU reference.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "cuda/optimizer_launch.h"
#include "harness.h"
#include "plan/hyper.h"

namespace harness {

using braze::DType;
using braze::TensorWork;

// An exact heap allocation: one element past the end is out of bounds.
class Buffer {
 public:
  // `front` elements lie before a 16-byte boundary's first element, so that data() is that far off.
  Buffer(DType dtype, int64_t elements, int front);
  Buffer(Buffer&&) = default;
  char* data() const { return memory_.get() + front_; }
  char* memory() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }
  DType dtype() const { return dtype_; }

 private:
  struct Free {
    void operator()(char* memory) const { free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t bytes_, front_;
  DType dtype_;
};

size_t size_of(DType dtype);
void put(char* at, DType dtype, double value);
double get(const char* at, DType dtype);
void fill(Buffer& buffer, Random& random, bool positive);
// Same bits, or NaN in both; else where they differ.
bool same(const Buffer& one, const Buffer& other, std::string& difference);

// Columns as in cuda::Column.
struct Spec {
  std::vector<int64_t> sizes = {0};
  DType param = DType::f32, grad = DType::f32, sum = DType::f32, state = DType::f32;
  bool has_grad = true, has_sum = false, first = false;
  bool has_average = false, first_average = false;
  int hyper = 0;
  int phase[braze::cuda::kNumColumns] = {};                     // elements off a 16-byte boundary
  std::vector<int64_t> strides[braze::cuda::kNumColumns] = {};  // none: linear
  double step = -1;  // count in device memory before the step; negative: none
  bool step_is_double = false;
};

class Problem {
 public:
  // rule: its index in Rules. states[hyper]: the state columns that a tensor with that hyper has,
  // as bits.
  Problem(int rule, std::vector<Spec> specs, std::vector<uint32_t> states, uint64_t salt = 0);
  std::vector<TensorWork> device, host;
  const std::vector<Spec>& specs() const { return specs_; }
  double step_of(size_t tensor) const;  // in the kernels' memory
  void set_first(bool first);
  void set_first_average(bool first);
  // Copies the kernels' values to the reference.
  void equalize();
  // All columns have the same bits, and what lies around and between the elements does.
  bool check(const char* file, int line) const;
  // Has any byte of the kernels' memory changed since equalize()?
  bool untouched() const;

 private:
  struct Column {
    size_t tensor;
    const char* name;
    Buffer device, host;
  };
  std::vector<Spec> specs_;
  std::vector<Column> columns_;
  std::vector<std::unique_ptr<double>> steps_;
};

// Every option that some rule has, one after the other in tests.
struct Options {
  bool penalty = false, amsgrad = false, momentum = false, nesterov = false, decoupled = false,
       centered = false;
};
// The value of an entry of param_groups; `which` varies the numbers.
double number_for(const std::string& name, const Options& options, int which);
bool flag_for(const std::string& name, const Options& options, int which);

template <class Rule>
typename Rule::Options options_of(const Options& options, int which) {
  typename Rule::Options result = {};
  for (const braze::Field& field : Rule::kFields) {
    char* to = reinterpret_cast<char*>(&result) + field.offset;
    if (field.kind == braze::Field::flag) {
      *reinterpret_cast<bool*>(to) = flag_for(field.name, options, which);
    } else {
      *reinterpret_cast<double*>(to) =
          field.kind == braze::Field::sign ? (flag_for(field.name, options, which) ? -1.0 : 1.0)
          : field.kind == braze::Field::second_of_pair ? 0.999 - 0.01 * (which % 2)
                                                       : number_for(field.name, options, which);
    }
  }
  return result;
}

constexpr braze::StepInputs inputs_of(double step) {
  return {.step = step, .grad_scale = 0.5, .fold_weight = 0.75};
}
template <class Rule>
braze::Hyper<Rule> hyper_of(const Options& options, int which, double step = 1) {
  return braze::make_hyper<Rule>(options_of<Rule>(options, which), inputs_of(step));
}
template <class Rule>
uint32_t states_of(const Options& options) {
  const uint32_t flags = Rule::flags(options_of<Rule>(options, 0));
  uint32_t states = 0;
  for (int k = 0; k < Rule::kStates; ++k)
    states |= static_cast<uint32_t>(Rule::uses(flags, k)) << k;
  return states;
}
template <class Rule>
constexpr int kIndex = braze::Rules::index_of<Rule>();

// Where an operand has an element, in elements, and what it has there.
int64_t place_of(const TensorWork& work, const braze::Operand& operand, int64_t element);
double value_of(const TensorWork& work, const braze::Operand& operand, int64_t element);

// Of new parameters in their averages, in all steps.
inline double average_weight = 0.3;

template <class Hyper>
braze::Hypers view(const std::vector<Hyper>& hypers) {
  braze::Hypers result = braze::view_of(hypers);
  result.average_weight = average_weight;
  return result;
}

// The step by the CPU's loops.
void reference(Problem& problem, const braze::Hypers& hypers);
template <class Hyper>
void reference(Problem& problem, const std::vector<Hyper>& hypers) {
  reference(problem, view(hypers));
}
template <class Hyper>
cudaError_t launch(braze::cuda::StepLauncher& launcher, const braze::cuda::StepWork& work,
                   const std::vector<Hyper>& hypers, const braze::cuda::StepScale& scale,
                   cudaStream_t stream) {
  return launcher.step(work, view(hypers), scale, stream);
}

// A step by the kernels and by the reference; then everything is the same.
template <class Hyper>
void step_and_compare(Problem& problem, const std::vector<Hyper>& hypers, const char* file,
                      int line, braze::cuda::StepLauncher& launcher, int64_t generation = 1,
                      cudaStream_t stream = nullptr) {
  check_code(launch(launcher, {problem.device, generation}, hypers, {}, stream), cudaSuccess,
             "the step", file, line);
  check_code(cudaDeviceSynchronize(), cudaSuccess, "cudaDeviceSynchronize()", file, line);
  reference(problem, hypers);
  problem.check(file, line);
}

// The lengths around every boundary: vectors, chunks, and none.
const std::vector<int64_t>& lengths();

}  // namespace harness
