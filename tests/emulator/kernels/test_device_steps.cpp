// Steps whose numbers are in device memory: step counts, hyper-parameters, loss scale, overflow
// flag.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "intercept.h"
#include "problem.h"

namespace device_steps_tests {

using namespace harness;
using namespace braze;
using cuda::StepLauncher;
using cuda::StepScale;

namespace {

constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16;

// A number in device memory, of its own so that ASan sees a read beyond it.
struct Scalar {
  std::unique_ptr<double> d;
  std::unique_ptr<float> f;
  DeviceScalar on_device;
  Scalar(double value, DType dtype) {
    if (dtype == f64) {
      d = std::make_unique<double>(value);
      on_device = {d.get(), f64};
    } else {
      f = std::make_unique<float>(static_cast<float>(value));
      on_device = {f.get(), f32};
    }
  }
  double value() const { return d ? *d : *f; }
};

struct Shape {
  int64_t numel;
  DType param = f32, state = f32;
  double step = -1;
  bool step_is_double = false;
  int hyper = 0;
  bool sum = false, average = false;
};

std::vector<Spec> make_specs(const std::vector<Shape>& shapes) {
  std::vector<Spec> specs;
  for (const Shape& shape : shapes) {
    Spec spec;
    spec.sizes = {shape.numel};
    spec.param = spec.grad = shape.param;
    spec.state = shape.state;
    spec.sum = shape.param == f64 ? f64 : f32;
    spec.has_sum = shape.sum;
    spec.has_average = shape.average;
    spec.step = shape.step;
    spec.step_is_double = shape.step_is_double;
    spec.hyper = shape.hyper;
    specs.push_back(spec);
  }
  return specs;
}

template <class Rule>
DeviceHyper<Rule> device_hyper(const Options& options, int which) {
  DeviceHyper<Rule> h = {};
  h.options = options_of<Rule>(options, which);
  h.inputs = inputs_of(3 + which);
  return h;
}

// Where a hyper reads this option from device memory.
template <class Rule>
DeviceScalar& scalar(DeviceHyper<Rule>& hyper, double Rule::Options::* option) {
  const size_t offset = static_cast<size_t>(reinterpret_cast<char*>(&(hyper.options.*option)) -
                                            reinterpret_cast<char*>(&hyper.options));
  size_t j = 0;
  for (const Field& field : Rule::kFields) {
    if (!field.may_be_on_device()) continue;
    if (field.offset == offset) break;
    ++j;
  }
  return hyper.scalars[j];
}

double number(const DeviceScalar& scalar, double otherwise) {
  if (scalar.data == nullptr) return otherwise;
  return scalar.dtype == f64 ? *static_cast<const double*>(scalar.data)
                             : *static_cast<const float*>(scalar.data);
}

// What the kernel is to make of it for a tensor whose count is `step` after the step.
template <class Rule>
Hyper<Rule> host_hyper(const DeviceHyper<Rule>& h, double inverse_scale, double clip, double step) {
  typename Rule::Options options = h.options;
  [&]<size_t... j>(std::index_sequence<j...>) {
    const auto read = [](double& option, const DeviceScalar& from) {
      option = number(from, option);
    };
    (read(DeviceHyper<Rule>::template field<j>(options), h.scalars[j]), ...);
  }(std::make_index_sequence<kDeviceFields<Rule>>{});
  StepInputs inputs = h.inputs;
  inputs.step = step;
  inputs.grad_scale *= inverse_scale * clip;
  inputs.fold_weight *= inverse_scale;
  return make_hyper<Rule>(options, inputs);
}

// The reference with a hyper per tensor, since each has its own step count.
template <class Rule>
void device_reference(Problem& problem, const std::vector<DeviceHyper<Rule>>& hypers,
                      double inverse_scale, const std::vector<double>& steps, double clip = 1) {
  std::vector<Hyper<Rule>> own;
  for (size_t i = 0; i < problem.host.size(); ++i) {
    const DeviceHyper<Rule>& h = hypers[static_cast<size_t>(problem.device[i].hyper)];
    own.push_back(host_hyper(h, inverse_scale, clip, steps[i] < 0 ? h.inputs.step : steps[i] + 1));
    problem.host[i].hyper = static_cast<int32_t>(i);
  }
  reference(problem, own);
}

std::vector<double> steps_of(const Problem& problem) {
  std::vector<double> steps;
  for (size_t i = 0; i < problem.device.size(); ++i) {
    steps.push_back(problem.device[i].step.data == nullptr ? -1 : problem.step_of(i));
  }
  return steps;
}

void check_counts(const Problem& problem, const std::vector<double>& before, double advanced) {
  const std::vector<double> after = steps_of(problem);
  for (size_t i = 0; i < before.size(); ++i) {
    if (before[i] >= 0 && !CHECK(after[i] == before[i] + advanced)) return;
  }
}

// Several steps of Adam; counts in device memory advance by one each.
void run_adam(const std::vector<Shape>& shapes, const std::vector<DeviceHyper<Adam>>& hypers,
              StepScale scale = {}, int count = 2) {
  std::vector<uint32_t> states;
  for (const DeviceHyper<Adam>& h : hypers) states.push_back(h.options.amsgrad ? 7 : 3);
  Problem problem(kIndex<Adam>, make_specs(shapes), states);
  StepLauncher launcher;
  const double inverse =
      scale.grad_scale == nullptr ? 1.0 : 1 / static_cast<double>(*scale.grad_scale);
  for (int k = 0; k < count; ++k) {
    const std::vector<double> before = steps_of(problem);
    CHECK_OK(launch(launcher, {problem.device, 1}, hypers, scale, nullptr));
    device_reference(problem, hypers, inverse, before);
    if (!problem.check(__FILE__, __LINE__)) return;
    check_counts(problem, before, 1);
  }
}

}  // namespace

// Plain tensors with different counts and hypers, so that blocks make arguments again and again.
TEST(device_counts) {
  for (const int device : {0, 1}) {
    OnDevice there(device);
    std::vector<Shape> shapes;
    std::vector<DeviceHyper<Adam>> hypers;
    for (int h = 0; h < 3; ++h) hypers.push_back(device_hyper<Adam>({.penalty = h == 1}, h));
    for (int i = 0; i < 24; ++i) {
      shapes.push_back(
          {i % 5 == 4 ? 8200 : 40 + i, f32, f32, i % 4 == 3 ? -1.0 : i % 7, i % 2 == 1, i % 3});
    }
    Case note("device %d", device);
    run_adam(shapes, hypers);
  }
}

// Later chunks need no new arguments, so that threads read counts at their own pace. Each count is
// read by one block and advanced by another.
TEST(equal_device_counts) {
  OnDevice one(1);
  run_adam(std::vector<Shape>(12, {70, f32, f32, 5}), {device_hyper<Adam>({}, 0)});
  run_adam({{50000, f32, f32, 0}, {40000, bf16, bf16, 3, true}}, {device_hyper<Adam>({}, 0)});
}

// The same counts, but other hypers from chunk to chunk.
TEST(equal_counts_other_hypers) {
  OnDevice one(1);
  std::vector<Shape> shapes;
  for (int i = 0; i < 12; ++i) shapes.push_back({70, f32, f32, 5, false, i % 3});
  run_adam(shapes, {device_hyper<Adam>({}, 0), device_hyper<Adam>({}, 1),
                    device_hyper<Adam>({.penalty = true}, 2)});
}

// Every dtype, amsgrad and accumulators, in one launch.
TEST(device_counts_general) {
  OnDevice small_one(1);
  std::vector<Shape> shapes;
  const std::vector hypers = {device_hyper<Adam>({.penalty = true, .amsgrad = true}, 0),
                              device_hyper<Adam>({.decoupled = true}, 1)};
  int i = 0;
  for (const DType param : {f32, f64, bf16, DType::f16}) {
    for (const bool sum : {false, true}) {
      for (const int64_t numel : {1, 300, 8200}) {
        ++i;
        shapes.push_back(
            {numel, param, i % 2 ? param : f32, i % 5 * 100.0, i % 3 == 0, i % 2, sum});
      }
    }
  }
  run_adam(shapes, hypers);
}

TEST(device_hypers) {
  for (const DType dtype : {f32, f64}) {
    const Scalar lr(0.003, dtype), beta1(0.8, dtype), beta2(0.99, dtype), decay(0.05, dtype),
        zero(0, dtype);
    std::vector hypers = {device_hyper<Adam>({}, 0), device_hyper<Adam>({}, 1),
                          device_hyper<Adam>({}, 2)};
    scalar(hypers[0], &Adam::Options::lr) = lr.on_device;
    scalar(hypers[0], &Adam::Options::beta1) = beta1.on_device;
    scalar(hypers[0], &Adam::Options::beta2) = beta2.on_device;
    scalar(hypers[1], &Adam::Options::weight_decay) =
        decay.on_device;  // a penalty only the device knows
    hypers[2].options.weight_decay = 0.5;
    scalar(hypers[2], &Adam::Options::weight_decay) = zero.on_device;
    run_adam({{100, f32, f32, 0, false, 0},
              {200, f32, f32, -1, false, 1},
              {300, f64, f64, 4, true, 2},
              {50, bf16, bf16, 5, false, 1}},
             hypers);
  }
}

TEST(device_sgd) {
  const Scalar lr(0.03, f32), momentum(0.7, f64), decay(0.01, f32), dampening(0.1, f32);
  const std::vector<Options> all = {{},
                                    {.penalty = true},
                                    {.momentum = true},
                                    {.penalty = true, .momentum = true, .nesterov = true}};
  for (const Options& options : all) {
    for (const bool first : {false, true}) {
      DeviceHyper<Sgd> on_device = device_hyper<Sgd>(options, 1);
      DeviceHyper<Sgd> in_window = device_hyper<Sgd>(options, 2);
      in_window.inputs.in_window = true;
      scalar(on_device, &Sgd::Options::lr) = lr.on_device;
      if (options.momentum) scalar(on_device, &Sgd::Options::momentum) = momentum.on_device;
      scalar(on_device, &Sgd::Options::weight_decay) = decay.on_device;
      scalar(on_device, &Sgd::Options::dampening) = dampening.on_device;
      const std::vector hypers = {device_hyper<Sgd>(options, 0), on_device, in_window};
      Problem problem(kIndex<Sgd>,
                      make_specs({{100, f32, f32, -1, false, 0},
                                  {9000, bf16, bf16, 7, false, 1},
                                  {30, f64, f32, 2, true, 2},
                                  {77, f32, f32, -1, false, 1, true}}),
                      std::vector<uint32_t>(3, options.momentum ? 1 : 0));
      problem.set_first(first && options.momentum);
      StepLauncher launcher;
      const float scale = 4;
      const std::vector<double> before = steps_of(problem);
      CHECK_OK(launch(launcher, {problem.device, 1}, hypers, {&scale, nullptr}, nullptr));
      device_reference(problem, hypers, 0.25, before);
      problem.check(__FILE__, __LINE__);
      check_counts(problem, before, 1);
    }
  }
}

TEST(loss_scale) {
  const float scale = 1024, no_overflow = 0;
  for (const double step : {-1.0, 6.0}) {
    run_adam({{500, f32, f32, step}, {9000, bf16, bf16, step, true, 1}},
             {device_hyper<Adam>({.penalty = true}, 0), device_hyper<Adam>({}, 1)},
             {&scale, &no_overflow});
  }
}

// found_inf: nothing changes, counts included, and the next step is as if nothing had been.
TEST(overflow) {
  for (const int device : {0, 1}) {
    OnDevice there(device);
    std::vector<Shape> shapes;
    for (int i = 0; i < (small() ? 4 : 12); ++i)
      shapes.push_back({9000, f32, f32, double(i), i % 2 == 0, 0, false, true});
    Problem problem(kIndex<Adam>, make_specs(shapes), {3});
    const std::vector hypers = {device_hyper<Adam>({}, 0)};
    StepLauncher launcher;
    for (const float found : {1.0f, 0.0f, NAN, INFINITY, -1.0f, 0.0f}) {
      const float scale = 8;
      const std::vector<double> before = steps_of(problem);
      CHECK_OK(launch(launcher, {problem.device, 1}, hypers, {&scale, &found}, nullptr));
      if (found == 0) {
        device_reference(problem, hypers, 0.125, before);
      } else {
        CHECK(problem.untouched());
      }
      check_counts(problem, before, found == 0 ? 1 : 0);
      problem.check(__FILE__, __LINE__);
    }
  }
}

// Gradients are clipped to the norm of all devices, accumulators' weights are not.
TEST(clipped_steps) {
  const float grad_scale = 4;
  const double none = -1, squares[] = {3e4, 0.25, 1e4};
  const struct {
    int devices;
    double norm_scale, max_norm;
  } cases[] = {{1, 1, 2}, {3, 0.5, 0.125}, {3, 1, 1e3}, {2, 1, 0}, {3, 1, none}};
  for (const auto& c : cases) {
    Case note("%d devices, norm at most %g", c.devices, c.max_norm);
    Problem problem(kIndex<Adam>,
                    make_specs({{9000, f32, f32, 3},
                                {300, f64, f64, 4, true},
                                {50, bf16, bf16, 5, false, 0, true, true}}),
                    {3});
    StepScale scale;
    scale.grad_scale = &grad_scale;
    scale.squares = squares;
    scale.num_squares = c.devices;
    scale.norm_scale = c.norm_scale;
    scale.max_norm = c.max_norm;
    double total = 0;
    for (int i = 0; i < c.devices; ++i) total += squares[i];
    const double norm = std::sqrt(total) * c.norm_scale / 4;
    const double clip = c.max_norm < 0 ? 1 : std::min(1.0, c.max_norm / (norm + 1e-6));
    const std::vector hypers = {device_hyper<Adam>({}, 0)};
    const std::vector<double> before = steps_of(problem);
    StepLauncher launcher;
    CHECK_OK(launch(launcher, {problem.device, 1}, hypers, scale, nullptr));
    device_reference(problem, hypers, 0.25, before, clip);
    problem.check(__FILE__, __LINE__);
  }
}

// Squares that are not finite skip the step where that is asked for, else they are in the norm.
TEST(overflow_of_squares) {
  for (const double bad : {HUGE_VAL, std::nan(""), 1.0}) {
    for (const bool skip : {true, false}) {
      Problem problem(kIndex<Sgd>, make_specs({{9000, f32, f32, 3, false, 0, false, true}}), {0});
      const double squares[] = {4, bad};
      StepScale scale;
      scale.squares = squares;
      scale.num_squares = 2;
      scale.max_norm = 1;
      scale.skip_overflow = skip;
      const std::vector hypers = {device_hyper<Sgd>({}, 0)};
      const std::vector<double> before = steps_of(problem);
      StepLauncher launcher;
      CHECK_OK(launch(launcher, {problem.device, 1}, hypers, scale, nullptr));
      if (skip && !std::isfinite(bad)) {
        CHECK(problem.untouched());
        check_counts(problem, before, 0);
        continue;
      }
      device_reference(problem, hypers, 1, before, 1 / (std::sqrt(4 + bad) + 1e-6));
      problem.check(__FILE__, __LINE__);
      check_counts(problem, before, 1);
    }
  }
}

TEST(averages_on_device) {
  for (const bool all : {true, false}) {
    run_adam({{9000, f32, f32, 3, false, 0, false, true},
              {300, bf16, bf16, 5, true, 0, false, all},
              {70, DType::f16, DType::f16, -1, true, 0, false, true}},
             {device_hyper<Adam>({.penalty = true}, 0)});
  }
}

// Gradients are changed where they are.
TEST(clipped_gradients) {
  for (const bool by_value : {false, true}) {
    for (const bool wide : {false, true}) {
      std::vector<Shape> shapes = {{9000, f32}, {33, bf16}};
      if (wide) shapes.push_back({20, f64});
      Problem problem(kIndex<Clip>, make_specs(shapes), {0});
      for (auto* all : {&problem.device, &problem.host}) {
        for (TensorWork& work : *all) work.grad = work.param;
      }
      const double squares = 49;
      StepScale scale;
      scale.squares = &squares;
      scale.num_squares = 1;
      scale.max_norm = 3;
      const std::vector hypers = {device_hyper<Clip>({.centered = by_value}, 0)};
      StepLauncher launcher;
      CHECK_OK(launch(launcher, {problem.device, 1}, hypers, scale, nullptr));
      device_reference(problem, hypers, 1, steps_of(problem), 3 / (7 + 1e-6));
      problem.check(__FILE__, __LINE__);
      const std::vector<Hyper<Clip>> from_host(shapes.size(),
                                               hyper_of<Clip>({.centered = by_value}, 0));
      step_and_compare(problem, from_host, __FILE__, __LINE__, launcher, 2);
    }
  }
}

// Sgd's counts, which no formula reads, advance as well.
TEST(counts_without_elements) {
  StepLauncher launcher;
  const std::vector hypers = {device_hyper<Adam>({}, 0)};
  Problem empty(kIndex<Adam>, make_specs({{0, f32, f32, 0, false}, {0, f64, f64, 5, true}}), {3});
  for (int k = 0; k < 2; ++k) {
    const std::vector<double> before = steps_of(empty);
    CHECK_OK(launch(launcher, {empty.device, 1}, hypers, {}, nullptr));
    check_counts(empty, before, 1);
  }
  const float overflow = 1;
  const std::vector<double> before = steps_of(empty);
  CHECK_OK(launch(launcher, {empty.device, 1}, hypers, {nullptr, &overflow}, nullptr));
  check_counts(empty, before, 0);
  const std::vector<TensorWork> none;
  CHECK_OK(launch(launcher, {none, 2}, std::vector<DeviceHyper<Adam>>(), {}, nullptr));
}

// More tensors than threads, and a table in device memory.
TEST(many_device_counts) {
  for (const int count : {300, 700}) {
    std::vector<Shape> shapes;
    for (int i = 0; i < count; ++i) shapes.push_back({1 + i % 3, f32, f32, double(i), i % 2 == 0});
    Case note("%d tensors", count);
    run_adam(shapes, {device_hyper<Adam>({}, 0)}, {}, small() ? 1 : 2);
    CHECK(intercept::last_grid() ==
          std::min(static_cast<unsigned>(count), 132u * 4));  // what the device holds at once
  }
}

// Kernels differ in how many blocks a multiprocessor holds.
TEST(occupancy_of_each_kernel) {
  for (const bool amsgrad : {false, true}) {
    run_adam({{9, f32, f32, 5}}, {device_hyper<Adam>({.amsgrad = amsgrad}, 0)});
  }
  CHECK(intercept::occupancies() >= 2);
}

}  // namespace device_steps_tests
