// Steps with arguments from the host, against the CPU: every algorithm, dtype, length, alignment
// and layout.
#include <algorithm>
#include <cstring>
#include <utility>

#include "intercept.h"
#include "problem.h"

namespace steps_tests {

using namespace harness;
using namespace braze;
using braze::cuda::StepLauncher;

namespace {

struct Types {
  DType param, grad, sum, state;
};
constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
const std::vector<Types> kUniform = {
    {f32, f32, f32, f32}, {bf16, bf16, f32, bf16}, {f16, f16, f32, f16}};
const std::vector<Types> kGeneral = {
    {f32, f32, f32, f32},   {f64, f64, f64, f64},  {bf16, bf16, bf16, bf16}, {f16, f16, f32, f16},
    {bf16, bf16, f32, f32}, {f32, bf16, f32, f32}, {f16, f32, f32, bf16},    {f32, f64, f64, f16},
    {f64, f32, f64, bf16},  {bf16, f16, f32, f64}};

// Aligned; off by the same; by amounts that agree within some vectors; by different amounts.
constexpr int kPhases = 4;
int phase(int pattern, int column) {
  switch (pattern) {
    case 0: return 0;
    case 1: return 3;
    case 2: return 1 + 4 * column;
    default: return column;
  }
}

Spec make_spec(int64_t length, const Types& types, int pattern) {
  Spec spec;
  spec.sizes = {length};
  spec.param = types.param;
  spec.grad = types.grad;
  spec.sum = types.sum;
  spec.state = types.state;
  for (int c = 0; c < cuda::kNumColumns; ++c) spec.phase[c] = phase(pattern, c);
  return spec;
}

// Every length with every choice of types; the small list takes alignments and accumulators in
// turn instead of all of them.
std::vector<Spec> make_specs(const std::vector<Types>& all, bool with_sums) {
  std::vector<Spec> specs;
  const int sums = with_sums ? 3 : 1;
  int turn = 0;
  for (const int64_t length : lengths()) {
    for (const Types& types : all) {
      const int combinations = kPhases * sums;
      const bool long_one = length > 2000;
      const int from = small() || long_one ? turn : 0;
      const int to = small() || long_one ? turn + 1 : combinations;
      for (int k = from; k < to; ++k) {
        Spec spec = make_spec(length, types, k % kPhases);
        const int sum = k / kPhases % sums;
        spec.has_sum = sum != 0;
        spec.has_grad = sum != 2;
        specs.push_back(spec);
      }
      turn = (turn + 5) % combinations;
    }
  }
  return specs;
}

const std::vector<Options> kAdam = {{.penalty = false},
                                    {.penalty = true},
                                    {.amsgrad = true},
                                    {.penalty = true, .amsgrad = true},
                                    {.decoupled = true}};
const std::vector<Options> kSgd = {{.penalty = false},
                                   {.penalty = true},
                                   {.momentum = true},
                                   {.penalty = true, .momentum = true},
                                   {.momentum = true, .nesterov = true},
                                   {.penalty = true, .momentum = true, .nesterov = true}};

const std::vector<Options> kRmsprop = {{},
                                       {.penalty = true},
                                       {.momentum = true},
                                       {.centered = true},
                                       {.penalty = true, .momentum = true, .centered = true}};

// Two steps, so that the second works on what the first wrote.
template <class Rule>
void check(const std::vector<Spec>& specs, const Options& options) {
  Case note("%s penalty %d amsgrad %d momentum %d nesterov %d decoupled %d", Rule::kName,
            options.penalty, options.amsgrad, options.momentum, options.nesterov,
            options.decoupled);
  const uint32_t states = states_of<Rule>(options);
  Problem problem(kIndex<Rule>, specs, {states});
  problem.set_first(Rule::kFirstOverwrites && states != 0);
  StepLauncher launcher;
  for (int step = 1; step <= 2; ++step) {
    const std::vector hypers = {hyper_of<Rule>(options, 0, step)};
    problem.set_first_average(step == 1);
    step_and_compare(problem, hypers, __FILE__, __LINE__, launcher);
    problem.set_first(false);
  }
}

// Shapes of up to five dimensions, each column with strides of its own.
std::vector<Spec> strided_specs(bool many) {
  struct Shape {
    std::vector<int64_t> sizes;
    std::vector<std::vector<int64_t>> strides;  // columns take them in turn
  };
  const std::vector<Shape> shapes = {
      {{}, {{}}},
      {{5}, {{2}, {1}, {3}}},
      {{0, 4}, {{4, 1}, {1, 0}}},
      {{7, 6}, {{6, 1}, {1, 7}, {20, 3}}},
      {{3, 1, 9}, {{9, 9, 1}, {1, 100, 3}, {40, 5, 4}}},
      {{2, 3, 4, 5}, {{60, 20, 5, 1}, {1, 2, 6, 24}, {130, 40, 9, 2}}},
      {{2, 2, 3, 2, 4}, {{48, 24, 8, 4, 1}, {1, 2, 4, 12, 24}, {300, 150, 47, 23, 5}}},
      {{91, 93}, {{93, 1}, {1, 91}, {95, 1}}},
  };
  std::vector<Spec> specs;
  int turn = 0;
  for (const Shape& shape : shapes) {
    for (const Types& types : kGeneral) {
      if (!many && ++turn % 3 != 0) continue;
      Spec spec = make_spec(0, types, 0);
      spec.sizes = shape.sizes;
      for (int c = 0; c < cuda::kNumColumns; ++c) {
        spec.strides[c] = shape.strides[static_cast<size_t>(c + turn) % shape.strides.size()];
        spec.phase[c] = turn % 2 * c;
      }
      spec.has_sum = turn % 5 > 2;
      spec.has_grad = turn % 5 != 4;
      specs.push_back(spec);
    }
  }
  return specs;
}

}  // namespace

TEST(plain_steps) {
  for (const Options& options : kAdam) check<Adam>(make_specs(kUniform, false), options);
  for (const Options& options : kSgd) check<Sgd>(make_specs(kUniform, false), options);
  for (const Options& options : kRmsprop) check<Rmsprop>(make_specs(kUniform, false), options);
  for (const bool penalty : {false, true})
    check<Lion>(make_specs(kUniform, false), {.penalty = penalty});
}

TEST(general_steps) {
  for (const Options& options : kAdam) check<Adam>(make_specs(kGeneral, true), options);
  for (const Options& options : kSgd) check<Sgd>(make_specs(kGeneral, true), options);
  for (const Options& options : kRmsprop) check<Rmsprop>(make_specs(kGeneral, true), options);
  for (const bool penalty : {false, true})
    check<Lion>(make_specs(kGeneral, true), {.penalty = penalty});
  check<Fold>(make_specs(kGeneral, false), {});
}

// Accumulators of the parameters' own dtype, in every tensor.
TEST(accumulator_steps) {
  for (const bool has_grad : {false, true}) {
    std::vector<Spec> specs = make_specs({kUniform[0]}, false);
    for (Spec& spec : specs) spec.has_sum = true, spec.has_grad = has_grad;
    check<Adam>(specs, kAdam[0]);
    check<Sgd>(specs, kSgd[2]);
  }
}

TEST(strided_steps) {
  const std::vector<Spec> specs = strided_specs(!small());
  for (const Options& options : {kAdam[0], kAdam[3]}) check<Adam>(specs, options);
  for (const Options& options : {kSgd[0], kSgd[5]}) check<Sgd>(specs, options);
  std::vector<Spec> with_grads = specs;
  for (Spec& spec : with_grads) spec.has_grad = true, spec.has_sum = false;
  check<Fold>(with_grads, {});
}

// Running averages in every tensor and in some, from either end of the line to the parameter.
TEST(averaged_steps) {
  std::vector<Spec> plain = make_specs(kUniform, false), general = make_specs(kGeneral, true),
                    strided = strided_specs(false);
  for (Spec& spec : plain) spec.has_average = true;
  for (size_t i = 0; i < general.size(); ++i) general[i].has_average = i % 3 != 0;
  for (Spec& spec : strided) spec.has_average = true;
  check<Adam>(plain, kAdam[1]);
  check<Sgd>(plain, kSgd[2]);
  check<Sgd>(general, kSgd[5]);
  average_weight = 0.75;
  check<Rmsprop>(plain, kRmsprop[0]);
  check<Lion>(plain, {});
  check<Adam>(general, kAdam[3]);
  check<Sgd>(strided, kSgd[0]);
  average_weight = 0.3;
}

TEST(block_per_chunk) {
  check<Sgd>({make_spec(20000, kUniform[0], 0), make_spec(30000, kUniform[0], 0)}, {});
  CHECK(intercept::last_grid() == 3 + 4);
  check<Sgd>(std::vector<Spec>(600, make_spec(3, kUniform[0], 0)), {});
  CHECK(intercept::last_grid() == 600);
}

TEST(no_tensors) {
  StepLauncher launcher;
  const std::vector<TensorWork> none;
  emulator::reset_launch_count();
  CHECK_OK(launch(launcher, {none, 1}, std::vector<Hyper<Adam>>(), {}, nullptr));
  CHECK_OK(launch(launcher, {none, 1}, std::vector<Hyper<Sgd>>(), {}, nullptr));
  CHECK_OK(launch(launcher, {none, 1}, std::vector<Hyper<Fold>>(), {}, nullptr));
  Problem empty(kIndex<Adam>, {make_spec(0, kGeneral[0], 0), make_spec(0, kGeneral[1], 0)}, {3});
  CHECK_OK(launch(launcher, {empty.device, 2}, std::vector{hyper_of<Adam>({}, 0, 1)}, {}, nullptr));
  CHECK(emulator::launch_count(0) == 0);
}

// From one launch's argument to the table in device memory, and to a table for everything.
TEST(many_tensors) {
  const std::vector<int> all = {1, 200, 371, 600, 2100}, few = {371, 400};
  for (const int count : small() ? few : all) {
    Case note("%d tensors", count);
    std::vector<Spec> specs;
    for (int i = 0; i < count; ++i) {
      const auto& types = kGeneral[static_cast<size_t>(i) % kGeneral.size()];
      specs.push_back(make_spec((i + 1) % 9, types, i % kPhases));
    }
    Problem problem(kIndex<Adam>, specs, {3});
    StepLauncher launcher;
    emulator::reset_launch_count();
    for (int step = 1; step <= 3; ++step) {
      const std::vector hypers = {hyper_of<Adam>({}, 0, step)};
      step_and_compare(problem, hypers, __FILE__, __LINE__, launcher);
      // What stays is uploaded once: only a table too big for the argument changes every step.
      if (step == 3 && count <= 600) CHECK(launcher.bytes_uploaded() == 0);
    }
    CHECK(emulator::launch_count(0) == 3);
  }
}

// One hyper per tensor, of both arithmetic widths, tensors not in the order of the hypers.
TEST(many_hypers) {
  const std::vector<int> all = {2, 100, 465, 900}, few = {465};
  for (const int count : small() ? few : all) {
    Case note("%d hypers", count);
    std::vector<Spec> specs;
    std::vector<Hyper<Adam>> adam;
    std::vector<Hyper<Sgd>> sgd;
    for (int i = 0; i < count; ++i) {
      specs.push_back(make_spec(5 + i % 4, kGeneral[i % 3 == 0 ? 1 : 0], 0));
      specs.back().hyper = i * 7 % count;
      adam.push_back(hyper_of<Adam>({.penalty = i % 2 == 0}, i, 1 + i % 11));
      sgd.push_back(hyper_of<Sgd>({.penalty = i % 2 == 0, .momentum = i % 3 != 0}, i));
    }
    std::vector<uint32_t> adam_states(adam.size(), 3), sgd_states;
    for (const Hyper<Sgd>& h : sgd) sgd_states.push_back(h.flags & Sgd::kMomentum ? 1 : 0);
    Problem adam_problem(kIndex<Adam>, specs, adam_states);
    Problem sgd_problem(kIndex<Sgd>, specs, sgd_states);
    StepLauncher launcher;
    for (int step = 0; step < 2; ++step) {
      step_and_compare(adam_problem, adam, __FILE__, __LINE__, launcher, 2 * step);
      step_and_compare(sgd_problem, sgd, __FILE__, __LINE__, launcher, 2 * step + 1);
    }
  }
}

// One launcher, other algorithms and other lists: nothing stays from before.
TEST(changing_work) {
  StepLauncher launcher;
  const std::vector<Spec> specs = {make_spec(300, kGeneral[0], 0), make_spec(77, kGeneral[4], 1)};
  const std::vector<Spec> other = strided_specs(false);
  Problem first(kIndex<Adam>, specs, {3}), second(kIndex<Fold>, specs, {1}),
      third(kIndex<Adam>, other, {7});
  for (int round = 0; round < 2; ++round) {
    step_and_compare(first, std::vector{hyper_of<Adam>({}, 0, 1)}, __FILE__, __LINE__, launcher, 1);
    // The same generation, another algorithm.
    step_and_compare(second, std::vector{make_hyper<Fold>({.weight = 1, .keep = 0.5}, {})},
                     __FILE__, __LINE__, launcher, 1);
    step_and_compare(third, std::vector{hyper_of<Adam>({.amsgrad = true}, 0, 1)}, __FILE__,
                     __LINE__, launcher, 2);
  }
}

// Gradients, hypers and flags are read every step; the rest by its generation.
TEST(changing_gradients) {
  StepLauncher launcher;
  Problem problem(kIndex<Adam>, {make_spec(1000, kGeneral[0], 0)}, {3});
  const std::vector hypers = {hyper_of<Adam>({}, 0, 1)};
  step_and_compare(problem, hypers, __FILE__, __LINE__, launcher);
  std::vector<float> other(1000, 0.25f);
  problem.device[0].grad.data = problem.host[0].grad.data = other.data();
  step_and_compare(problem, hypers, __FILE__, __LINE__, launcher);
}

TEST(limited_chunks) {
  Problem problem(kIndex<Sgd>, {make_spec(20000, kGeneral[0], 0), make_spec(9000, kGeneral[2], 3)},
                  {0});
  StepLauncher launcher;
  launcher.limit_chunks(1, 4);  // the first tensor's last two, the second's first
  const std::vector hypers = {hyper_of<Sgd>({}, 0)};
  CHECK_OK(launch(launcher, {problem.device, 1}, hypers, {}, nullptr));
  for (TensorWork& work : problem.host) {
    const bool is_first = &work == &problem.host[0];
    const int64_t skip = is_first ? cuda::kChunkElements : 0;
    const size_t size = size_of(work.param.dtype);
    for (Operand* operand : {&work.param, &work.grad}) {
      operand->data = static_cast<char*>(operand->data) + skip * static_cast<int64_t>(size);
    }
    work.numel = is_first ? 20000 - skip : cuda::kChunkElements;
  }
  reference(problem, hypers);
  problem.check(__FILE__, __LINE__);
}

// Positive controls of ASan and MSan.
TEST(seeded_short_buffer) {
  Problem problem(kIndex<Sgd>, {make_spec(1000, kGeneral[0], 0)}, {0});
  ++problem.device[0].numel;
  StepLauncher launcher;
  CHECK_OK(launch(launcher, {problem.device, 1}, std::vector{hyper_of<Sgd>({}, 0)}, {}, nullptr));
  printf("no sanitizer stopped the kernel\n");
}

namespace {
// A first momentum buffer that nobody wrote, as a kernel may find it.
void step_on_fresh_buffer(bool first) {
  Problem problem(kIndex<Sgd>, {make_spec(1000, kGeneral[0], 0)}, {1});
  Buffer fresh(f32, 1000, 0);
  problem.device[0].state[0].data = fresh.data();
  problem.set_first(first);
  StepLauncher launcher;
  const std::vector hypers = {hyper_of<Sgd>({.momentum = true}, 0)};
  CHECK_OK(launch(launcher, {problem.device, 1}, hypers, {}, nullptr));
  if (first) {
    reference(problem, hypers);
    for (const auto& [got, wanted] : {std::pair(fresh.data(), problem.host[0].state[0].data),
                                      std::pair(static_cast<char*>(problem.device[0].param.data),
                                                problem.host[0].param.data)}) {
      CHECK(memcmp(got, wanted, fresh.bytes()) == 0);
    }
  } else if (static_cast<float*>(problem.device[0].param.data)[7] > 0) {
    printf("no sanitizer stopped the use of an uninitialised buffer\n");
  }
}
}  // namespace
TEST(fresh_buffer) { step_on_fresh_buffer(true); }
TEST(seeded_fresh_buffer) { step_on_fresh_buffer(false); }

}  // namespace steps_tests
