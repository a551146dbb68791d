// One pass over gradients: sums, and what a step adds to them, against long double.
#include <cmath>
#include <cstring>
#include <limits>

#include "plan/gradient_sums.h"
#include "problem.h"

namespace measure_tests {

using namespace harness;
using namespace braze;
using namespace braze::cuda;

namespace {

constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;

// Exactly the memory that a pass needs, so that ASan sees a write beyond it.
struct Pass {
  std::vector<double> sums;
  MeasuredTotals totals = {-1, -1, -1};
  StepScale scale;
  bool statistics;

  Pass(const Problem& problem, bool with_statistics) : statistics(with_statistics) {
    int64_t chunks = 0;
    for (const TensorWork& work : problem.device) chunks += chunks_of(work);
    sums.assign(static_cast<size_t>(chunks * (statistics ? kSumColumns : 1)), -1);
    scale.sums = sums.data();
  }
  static int64_t chunks_of(const TensorWork& work) {
    return (work.numel + kChunkElements - 1) / kChunkElements;
  }

  template <class Hyper>
  cudaError_t measure(StepLauncher& launcher, const Problem& problem,
                      const std::vector<Hyper>& hypers, double weight,
                      cudaStream_t stream = nullptr) {
    return launcher.measure({problem.device, 1}, view(hypers), weight, scale, statistics, &totals,
                            stream);
  }

  // [tensor]
  std::vector<GradientSums> by_tensor(const Problem& problem) const {
    std::vector<GradientSums> result;
    const size_t chunks = sums.size() / (statistics ? kSumColumns : 1);
    size_t chunk = 0;
    for (const TensorWork& work : problem.device) {
      GradientSums all;
      for (int64_t c = 0; c < chunks_of(work); ++c, ++chunk) {
        const auto column = [&](int k) { return sums[static_cast<size_t>(k) * chunks + chunk]; };
        all.squares += column(kSquares);
        if (!statistics) continue;
        all.largest = std::fmax(all.largest, column(kLargest));
        all.zeros += static_cast<int64_t>(column(kZeros));
        all.non_finite += static_cast<int64_t>(column(kNonFinite));
        all.update_squares += column(kUpdateSquares);
        all.param_squares += column(kParamSquares);
      }
      result.push_back(all);
    }
    return result;
  }
};

// What a step takes as the gradient's element.
template <class T>
double gradient(const TensorWork& work, int64_t i, T weight) {
  const bool has_grad = work.grad.data != nullptr;
  const T g = has_grad ? static_cast<T>(value_of(work, work.grad, i)) : T(0);
  if (work.sum.data == nullptr) return weight * g;
  const T sum = static_cast<T>(value_of(work, work.sum, i));
  return has_grad ? fused_multiply_add(weight, g, sum) : sum;
}

struct Exact {
  long double squares = 0;
  GradientSums sums;
};

Exact exact(const TensorWork& work, double weight) {
  Exact result;
  if (work.grad.data == nullptr && work.sum.data == nullptr) return result;
  for (int64_t i = 0; i < work.numel; ++i) {
    const double g =
        work.is_double ? gradient(work, i, weight) : gradient(work, i, static_cast<float>(weight));
    result.squares += static_cast<long double>(g) * g;
    if (std::fabs(g) > result.sums.largest) result.sums.largest = std::fabs(g);
    result.sums.zeros += g == 0;
    result.sums.non_finite += !std::isfinite(g);
  }
  return result;
}

bool close(double one, long double other) {
  if (!std::isfinite(other)) return std::isnan(one) == std::isnan(other) && !std::isfinite(one);
  return std::fabs(one - other) <= 1e-13L * other;
}

void check_pass(const Pass& pass, const Problem& problem, double weight) {
  long double squares = 0;
  const std::vector<GradientSums> found = pass.by_tensor(problem);
  for (size_t i = 0; i < found.size(); ++i) {
    const TensorWork& work = problem.device[i];
    Case note("tensor %zu of %lld, dtypes %d %d %d", i, static_cast<long long>(work.numel),
              static_cast<int>(work.param.dtype), static_cast<int>(work.grad.dtype),
              static_cast<int>(work.sum.dtype));
    const Exact wanted = exact(work, weight);
    squares += wanted.squares;
    if (!CHECK(close(found[i].squares, wanted.squares))) return;
    if (!pass.statistics) continue;
    CHECK(found[i].largest == wanted.sums.largest);
    CHECK(found[i].zeros == wanted.sums.zeros);
    CHECK(found[i].non_finite == wanted.sums.non_finite);
    CHECK(found[i].update_squares == 0 && found[i].param_squares == 0);
  }
  const StepScale& scale = pass.scale;
  const double loss_scale = scale.grad_scale == nullptr ? 1 : *scale.grad_scale;
  CHECK(close(pass.totals.squares, squares));
  const auto norm =
      static_cast<float>(std::sqrt(pass.totals.squares) * scale.norm_scale / loss_scale);
  CHECK(pass.totals.norm == norm || (std::isnan(norm) && std::isnan(pass.totals.norm)));
  CHECK(pass.totals.found_inf == (std::isfinite(pass.totals.squares) ? 0.0f : 1.0f));
}

std::vector<Spec> make_specs() {
  struct Types {
    DType param, grad, sum;
  };
  const Types all[] = {{f32, f32, f32},  {f64, f64, f64}, {bf16, bf16, f32}, {f16, f16, f16},
                       {f32, bf16, f32}, {f32, f64, f32}, {f64, f32, f64}};
  std::vector<Spec> specs;
  int turn = 0;
  for (const int64_t length : lengths()) {
    for (const Types& types : all) {
      Spec spec;
      spec.sizes = {length};
      spec.param = types.param;
      spec.grad = types.grad;
      spec.sum = types.sum;
      turn += 3;
      // Of gradients and accumulators: one, both or neither; on vectors or off them.
      spec.has_grad = turn % 7 != 0;
      spec.has_sum = turn % 5 < 2;
      spec.phase[kGrad] = turn % 4 * (turn % 3);
      spec.phase[kSum] = turn % 8 == 1 ? 1 : spec.phase[kGrad];
      specs.push_back(spec);
      if (length != 8 && length != 8193 && length != 8203) continue;
      spec.sizes = {length / 2, 2};
      for (int c = 0; c < kNumColumns; ++c) spec.strides[c] = {2 + c, c == kSum ? 2 : 1};
      specs.push_back(spec);
    }
  }
  return specs;
}

// Of finite numbers, some of them zero.
void fill_gradients(Problem& problem) {
  Random random(seed());
  for (TensorWork& work : problem.device) {
    for (const Operand& operand : {work.grad, work.sum}) {
      for (int64_t i = 0; operand.data != nullptr && i < work.numel; ++i) {
        const double value = random.below(16) == 0 ? -0.0 : random.uniform() * 4 - 2;
        put(static_cast<char*>(operand.data) +
                place_of(work, operand, i) * static_cast<int64_t>(size_of(operand.dtype)),
            operand.dtype, value);
      }
    }
  }
}

const std::vector hypers = {hyper_of<Adam>({}, 0)};

}  // namespace

// The same bits in every schedule.
TEST(measured_layouts) {
  for (const bool statistics : {false, true}) {
    Case note("statistics %d", statistics);
    Problem problem(kIndex<Adam>, make_specs(), {3});
    fill_gradients(problem);
    problem.equalize();
    for (const double weight : {1.0, 0.3}) {
      const float grad_scale = 8;
      StepLauncher launcher;
      Pass pass(problem, statistics);
      pass.scale.grad_scale = weight == 1 ? nullptr : &grad_scale;
      pass.scale.norm_scale = weight == 1 ? 1 : 0.25;
      CHECK_OK(pass.measure(launcher, problem, hypers, weight));
      check_pass(pass, problem, weight);
      CHECK(problem.untouched());
      static std::vector<double> before[2][2];
      std::vector<double>& first = before[statistics][weight == 1];
      const bool comparable = first.size() == pass.sums.size();
      CHECK(!comparable || memcmp(first.data(), pass.sums.data(), 8 * first.size()) == 0);
      first = pass.sums;
    }
  }
}

// At every kind of place, and not at the end of what was read before.
TEST(measured_overflow) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  for (const DType dtype : {f32, f64, bf16, f16}) {
    for (const int64_t place : {0, 1, 7, 4097, 8191, 8192, 9000}) {
      for (const double value : {HUGE_VAL, -HUGE_VAL, kNaN}) {
        if (small() && (place + static_cast<int>(dtype)) % 3 != 0) continue;
        Case note("%g at %lld", value, static_cast<long long>(place));
        Spec spec;
        spec.sizes = {9001};
        spec.param = spec.grad = dtype;
        spec.phase[kGrad] = 1;
        Problem problem(kIndex<Adam>, {spec}, {3});
        fill_gradients(problem);
        put(static_cast<char*>(problem.device[0].grad.data) +
                place * static_cast<int64_t>(size_of(dtype)),
            dtype, value);
        StepLauncher launcher;
        Pass pass(problem, true);
        CHECK_OK(pass.measure(launcher, problem, hypers, 1));
        check_pass(pass, problem, 1);
        CHECK(pass.totals.found_inf == 1);
      }
    }
  }
}

TEST(measured_nothing) {
  for (const int count : {0, 2}) {
    Spec empty;
    Problem problem(kIndex<Adam>, std::vector<Spec>(static_cast<size_t>(count), empty), {3});
    StepLauncher launcher;
    Pass pass(problem, count == 0);
    for (int again = 0; again < 2; ++again) {
      pass.totals = {-1, -1, -1};
      CHECK_OK(pass.measure(launcher, problem, hypers, 1));
      check_pass(pass, problem, 1);
    }
  }
}

// As many launches as a graph needs, of which the last finishes; and one table for it and the step.
TEST(measured_in_a_graph) {
  std::vector<Spec> specs(330);
  for (size_t i = 0; i < specs.size(); ++i) specs[i].sizes = {static_cast<int64_t>(i % 9)};
  Problem problem(kIndex<Adam>, specs, {3});
  fill_gradients(problem);
  Stream stream;
  StepLauncher launcher;
  Pass pass(problem, false), captured(problem, false);
  const auto capture = [&](cudaError_t wanted, int replays) {
    CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK_CODE(captured.measure(launcher, problem, hypers, 0.5, stream), wanted);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CHECK_OK(cudaStreamEndCapture(stream, &graph));
    CHECK_OK(cudaGraphInstantiate(&exec, graph, 0));
    for (int replay = 0; replay < replays; ++replay) {
      captured.totals = {-1, -1, -1};
      CHECK_OK(cudaGraphLaunch(exec, stream));
      CHECK_OK(cudaStreamSynchronize(stream));
      CHECK(captured.totals.squares == pass.totals.squares);
      check_pass(captured, problem, 0.5);
    }
    (void)cudaGraphExecDestroy(exec);
    (void)cudaGraphDestroy(graph);
  };
  capture(cudaErrorStreamCaptureUnsupported, 0);  // its counter cannot be allocated
  CHECK_OK(pass.measure(launcher, problem, hypers, 0.5, stream));
  CHECK_OK(cudaStreamSynchronize(stream));
  emulator::reset_launch_count();
  capture(cudaSuccess, small() ? 1 : 2);
  CHECK(emulator::launch_count(0) > (small() ? 1 : 2));
  // A step after it finds the table in device memory.
  CHECK(launcher.bytes_uploaded() != 0);
  CHECK_OK(launch(launcher, {problem.device, 1}, hypers, {}, stream));
  CHECK(launcher.bytes_uploaded() == 0);
}

namespace {
// The step after it adds what it did to each chunk.
void measure_and_step(const std::vector<Spec>& specs, bool on_device) {
  Case note("%zu tensors, on the device %d", specs.size(), on_device);
  OnDevice one(1);
  Problem problem(kIndex<Adam>, specs, {3});
  fill_gradients(problem);
  for (TensorWork& work : problem.device) {
    for (int64_t i = 0; i < work.numel; ++i) {
      const int64_t size = static_cast<int64_t>(size_of(work.param.dtype));
      put(static_cast<char*>(work.param.data) + place_of(work, work.param, i) * size,
          work.param.dtype, 0.01 * static_cast<double>(i % 100));
    }
  }
  problem.equalize();
  StepLauncher launcher;
  Pass pass(problem, true);
  std::vector<DeviceHyper<Adam>> device(1);
  device[0].options = options_of<Adam>({}, 0);
  device[0].inputs = inputs_of(1);
  if (on_device) {
    CHECK_OK(pass.measure(launcher, problem, device, 1));
    CHECK_OK(launch(launcher, {problem.device, 1}, device, pass.scale, nullptr));
  } else {
    CHECK_OK(pass.measure(launcher, problem, hypers, 1));
    CHECK_OK(launch(launcher, {problem.device, 1}, hypers, pass.scale, nullptr));
  }
  const std::vector<GradientSums> found = pass.by_tensor(problem);
  for (size_t i = 0; i < found.size(); ++i) {
    const TensorWork &after = problem.device[i], &before = problem.host[i];
    long double update = 0, param = 0;
    for (int64_t k = 0; k < after.numel; ++k) {
      const long double old = value_of(before, before.param, k),
                        difference = value_of(after, after.param, k) - old;
      update += difference * difference;
      param += old * old;
    }
    CHECK(close(found[i].update_squares, update));
    CHECK(close(found[i].param_squares, param));
    CHECK(close(found[i].squares, exact(after, 1).squares));
  }
  reference(problem, std::vector{hyper_of<Adam>({}, 0, 1)});
  problem.check(__FILE__, __LINE__);
}

std::vector<Spec> plain_specs(const std::vector<int64_t>& lengths) {
  std::vector<Spec> specs(lengths.size());
  for (size_t i = 0; i < specs.size(); ++i) {
    specs[i].sizes = {lengths[i]};
    specs[i].has_average = true;
  }
  return specs;
}
}  // namespace

TEST(measured_steps) {
  std::vector<Spec> specs = make_specs();
  for (size_t i = 0; i < specs.size(); ++i) specs[i].has_average = i % 2 == 0;
  for (const bool on_device : {false, true}) {
    measure_and_step(specs, on_device);
    measure_and_step(plain_specs(lengths()), on_device);
  }
}

// For sanitizers that can tell few threads apart; more chunks than the device has blocks.
TEST(measured_few_chunks) {
  for (const bool on_device : {false, true})
    measure_and_step(plain_specs({8200, 9, 5, 7, 50, 6}), on_device);
}

}  // namespace measure_tests
