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
void fill(Buffer& buffer, Random& random, bool positive);
// Same bits, or NaN in both; else where they differ.
bool same(const Buffer& one, const Buffer& other, std::string& difference);

// Columns as in cuda::Column.
struct Spec {
  std::vector<int64_t> sizes = {0};
  DType param = DType::f32, grad = DType::f32, sum = DType::f32, state = DType::f32;
  bool has_grad = true, has_sum = false, first = false;
  int hyper = 0;
  int phase[braze::cuda::kNumColumns] = {};                     // elements off a 16-byte boundary
  std::vector<int64_t> strides[braze::cuda::kNumColumns] = {};  // none: linear
  double step = -1;  // count in device memory before the step; negative: none
  bool step_is_double = false;
};

enum class Algorithm { adam, sgd, fold };

class Problem {
 public:
  // states[hyper]: how many state columns a tensor with that hyper has.
  Problem(Algorithm algorithm, std::vector<Spec> specs, std::vector<int> states, uint64_t salt = 0);
  std::vector<TensorWork> device, host;
  const std::vector<Spec>& specs() const { return specs_; }
  double step_of(size_t tensor) const;  // in the kernels' memory
  void set_first(bool first);
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

struct Options {
  bool penalty = false, amsgrad = false, momentum = false, nesterov = false, decoupled = false;
};
braze::AdamRule adam_rule(const Options& options, int which);
braze::SgdRule sgd_rule(const Options& options, int which);
braze::AdamHyper adam_hyper(const Options& options, int which, double step);
braze::SgdHyper sgd_hyper(const Options& options, int which);

void reference(Problem& problem, const std::vector<braze::AdamHyper>& hypers);
void reference(Problem& problem, const std::vector<braze::SgdHyper>& hypers);
void reference(Problem& problem, const std::vector<braze::FoldHyper>& hypers);

inline cudaError_t launch(braze::cuda::StepLauncher& launcher, const braze::cuda::StepWork& work,
                          const std::vector<braze::AdamHyper>& hypers, cudaStream_t stream) {
  return launcher.adam_step(work, hypers, stream);
}
inline cudaError_t launch(braze::cuda::StepLauncher& launcher, const braze::cuda::StepWork& work,
                          const std::vector<braze::SgdHyper>& hypers, cudaStream_t stream) {
  return launcher.sgd_step(work, hypers, stream);
}
inline cudaError_t launch(braze::cuda::StepLauncher& launcher, const braze::cuda::StepWork& work,
                          const std::vector<braze::FoldHyper>& hypers, cudaStream_t stream) {
  return launcher.fold_gradients(work, hypers, stream);
}

// A step by the kernels and by the reference; then everything is the same.
template <class Hyper>
void step_and_compare(Problem& problem, const std::vector<Hyper>& hypers, const char* file,
                      int line, braze::cuda::StepLauncher& launcher, int64_t generation = 1,
                      cudaStream_t stream = nullptr) {
  check_code(launch(launcher, {problem.device, generation}, hypers, stream), cudaSuccess,
             "the step", file, line);
  check_code(cudaDeviceSynchronize(), cudaSuccess, "cudaDeviceSynchronize()", file, line);
  reference(problem, hypers);
  problem.check(file, line);
}

// The lengths around every boundary: vectors, chunks, and none.
const std::vector<int64_t>& lengths();

}  // namespace harness
