// Steps whose numbers are in device memory: step counts, hyper-parameters, loss scale, overflow
// flag.
#include <cmath>
#include <cstring>
#include <memory>

#include "problem.h"

namespace device_steps_tests {

using namespace harness;
using namespace braze;
using cuda::LossScale;
using cuda::StepLauncher;

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
  bool sum = false;
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
    spec.step = shape.step;
    spec.step_is_double = shape.step_is_double;
    spec.hyper = shape.hyper;
    specs.push_back(spec);
  }
  return specs;
}

AdamDeviceHyper device_hyper(const Options& options, int which) {
  AdamDeviceHyper h = {};
  h.rule = adam_rule(options, which);
  h.step = 3 + which;
  h.grad_scale = 0.5;
  h.fold_weight = 0.75;
  h.amsgrad = options.amsgrad;
  return h;
}

SgdDeviceHyper device_hyper_sgd(const Options& options, int which, bool decayed) {
  SgdDeviceHyper h = {};
  h.rule = sgd_rule(options, which);
  h.grad_scale = 0.5;
  h.fold_weight = 0.75;
  h.decayed = decayed;
  h.has_momentum = options.momentum;
  h.nesterov = options.nesterov;
  return h;
}

double number(const DeviceScalar& scalar, double otherwise) {
  if (scalar.data == nullptr) return otherwise;
  return scalar.dtype == f64 ? *static_cast<const double*>(scalar.data)
                             : *static_cast<const float*>(scalar.data);
}

// What the kernel is to make of it for a tensor whose count is `step` after the step.
AdamHyper host_hyper(const AdamDeviceHyper& h, double inverse_scale, double step) {
  AdamRule rule = h.rule;
  rule.lr = number(h.lr, rule.lr);
  rule.beta1 = number(h.beta1, rule.beta1);
  rule.beta2 = number(h.beta2, rule.beta2);
  rule.weight_decay = number(h.weight_decay, rule.weight_decay);
  const auto d = adam_args(rule, bias_correction(rule.beta1, rule.beta2, step),
                           h.grad_scale * inverse_scale, h.fold_weight * inverse_scale);
  return {round_args<float>(d), d, d.l2 != 0 || d.l1 != 0, h.amsgrad};
}

SgdHyper host_hyper(const SgdDeviceHyper& h, double inverse_scale) {
  SgdRule rule = h.rule;
  rule.lr = number(h.lr, rule.lr);
  rule.weight_decay = number(h.weight_decay, rule.weight_decay);
  rule.momentum = number(h.momentum, rule.momentum);
  rule.dampening = number(h.dampening, rule.dampening);
  const auto d =
      sgd_args(rule, h.decayed, h.grad_scale * inverse_scale, h.fold_weight * inverse_scale);
  return {round_args<float>(d), d, d.l2 != 0 || d.l1 != 0, h.has_momentum, h.nesterov};
}

// The reference with a hyper per tensor, since each has its own step count.
void adam_reference(Problem& problem, const std::vector<AdamDeviceHyper>& hypers,
                    double inverse_scale, const std::vector<double>& steps) {
  std::vector<AdamHyper> own;
  for (size_t i = 0; i < problem.host.size(); ++i) {
    const AdamDeviceHyper& h = hypers[static_cast<size_t>(problem.device[i].hyper)];
    own.push_back(host_hyper(h, inverse_scale, steps[i] < 0 ? h.step : steps[i] + 1));
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
void run_adam(const std::vector<Shape>& shapes, const std::vector<AdamDeviceHyper>& hypers,
              LossScale scale = {}, int count = 2) {
  std::vector<int> states;
  for (const AdamDeviceHyper& h : hypers) states.push_back(h.amsgrad ? 3 : 2);
  Problem problem(Algorithm::adam, make_specs(shapes), states);
  StepLauncher launcher;
  const double inverse =
      scale.grad_scale == nullptr ? 1.0 : 1 / static_cast<double>(*scale.grad_scale);
  for (int k = 0; k < count; ++k) {
    const std::vector<double> before = steps_of(problem);
    CHECK_OK(launcher.adam_step({problem.device, 1}, hypers, scale, nullptr));
    adam_reference(problem, hypers, inverse, before);
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
    std::vector<AdamDeviceHyper> hypers;
    for (int h = 0; h < 3; ++h) hypers.push_back(device_hyper({.penalty = h == 1}, h));
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
  run_adam(std::vector<Shape>(12, {70, f32, f32, 5}), {device_hyper({}, 0)});
  run_adam({{50000, f32, f32, 0}, {40000, bf16, bf16, 3, true}}, {device_hyper({}, 0)});
}

// The same counts, but other hypers from chunk to chunk.
TEST(equal_counts_other_hypers) {
  OnDevice one(1);
  std::vector<Shape> shapes;
  for (int i = 0; i < 12; ++i) shapes.push_back({70, f32, f32, 5, false, i % 3});
  run_adam(shapes, {device_hyper({}, 0), device_hyper({}, 1), device_hyper({.penalty = true}, 2)});
}

// Every dtype, amsgrad and accumulators, in one launch.
TEST(device_counts_general) {
  OnDevice small_one(1);
  std::vector<Shape> shapes;
  const std::vector hypers = {device_hyper({.penalty = true, .amsgrad = true}, 0),
                              device_hyper({.decoupled = true}, 1)};
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
    std::vector hypers = {device_hyper({}, 0), device_hyper({}, 1), device_hyper({}, 2)};
    hypers[0].lr = lr.on_device;
    hypers[0].beta1 = beta1.on_device;
    hypers[0].beta2 = beta2.on_device;
    hypers[1].weight_decay = decay.on_device;  // a penalty only the device knows
    hypers[2].rule.weight_decay = 0.5;
    hypers[2].weight_decay = zero.on_device;
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
      SgdDeviceHyper on_device = device_hyper_sgd(options, 1, false);
      on_device.lr = lr.on_device;
      on_device.momentum = momentum.on_device;
      on_device.weight_decay = decay.on_device;
      on_device.dampening = dampening.on_device;
      const std::vector hypers = {device_hyper_sgd(options, 0, false), on_device,
                                  device_hyper_sgd(options, 2, true)};
      Problem problem(Algorithm::sgd,
                      make_specs({{100, f32, f32, -1, false, 0},
                                  {9000, bf16, bf16, 7, false, 1},
                                  {30, f64, f32, 2, true, 2},
                                  {77, f32, f32, -1, false, 1, true}}),
                      std::vector<int>(3, options.momentum ? 1 : 0));
      problem.set_first(first && options.momentum);
      StepLauncher launcher;
      const float scale = 4;
      const std::vector<double> before = steps_of(problem);
      CHECK_OK(launcher.sgd_step({problem.device, 1}, hypers, {&scale, nullptr}, nullptr));
      std::vector<SgdHyper> own;
      for (const SgdDeviceHyper& h : hypers) own.push_back(host_hyper(h, 0.25));
      reference(problem, own);
      problem.check(__FILE__, __LINE__);
      check_counts(problem, before, 1);
    }
  }
}

TEST(loss_scale) {
  const float scale = 1024, no_overflow = 0;
  for (const double step : {-1.0, 6.0}) {
    run_adam({{500, f32, f32, step}, {9000, bf16, bf16, step, true, 1}},
             {device_hyper({.penalty = true}, 0), device_hyper({}, 1)}, {&scale, &no_overflow});
  }
}

// found_inf: nothing changes, counts included, and the next step is as if nothing had been.
TEST(overflow) {
  for (const int device : {0, 1}) {
    OnDevice there(device);
    std::vector<Shape> shapes;
    for (int i = 0; i < (small() ? 4 : 12); ++i)
      shapes.push_back({9000, f32, f32, double(i), i % 2 == 0});
    Problem problem(Algorithm::adam, make_specs(shapes), {2});
    const std::vector hypers = {device_hyper({}, 0)};
    StepLauncher launcher;
    for (const float found : {1.0f, 0.0f, NAN, INFINITY, -1.0f, 0.0f}) {
      const float scale = 8;
      const std::vector<double> before = steps_of(problem);
      CHECK_OK(launcher.adam_step({problem.device, 1}, hypers, {&scale, &found}, nullptr));
      if (found == 0) {
        adam_reference(problem, hypers, 0.125, before);
      } else {
        CHECK(problem.untouched());
      }
      check_counts(problem, before, found == 0 ? 1 : 0);
      problem.check(__FILE__, __LINE__);
    }
  }
}

// Sgd's counts, which no formula reads, advance as well.
TEST(counts_without_elements) {
  StepLauncher launcher;
  const std::vector hypers = {device_hyper({}, 0)};
  Problem empty(Algorithm::adam, make_specs({{0, f32, f32, 0, false}, {0, f64, f64, 5, true}}),
                {2});
  for (int k = 0; k < 2; ++k) {
    const std::vector<double> before = steps_of(empty);
    CHECK_OK(launcher.adam_step({empty.device, 1}, hypers, {}, nullptr));
    check_counts(empty, before, 1);
  }
  const float overflow = 1;
  const std::vector<double> before = steps_of(empty);
  CHECK_OK(launcher.adam_step({empty.device, 1}, hypers, {nullptr, &overflow}, nullptr));
  check_counts(empty, before, 0);
  const std::vector<TensorWork> none;
  CHECK_OK(launcher.adam_step({none, 2}, std::vector<AdamDeviceHyper>(), {}, nullptr));
}

// More tensors than threads, and a table in device memory.
TEST(many_device_counts) {
  for (const int count : {300, 700}) {
    std::vector<Shape> shapes;
    for (int i = 0; i < count; ++i) shapes.push_back({1 + i % 3, f32, f32, double(i), i % 2 == 0});
    Case note("%d tensors", count);
    run_adam(shapes, {device_hyper({}, 0)}, {}, small() ? 1 : 2);
  }
}

}  // namespace device_steps_tests
