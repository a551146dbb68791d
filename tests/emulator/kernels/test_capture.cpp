// Steps captured in graphs: the arguments are in them, and no table is.
#include <memory>

#include "problem.h"

namespace capture_tests {

using namespace harness;
using namespace braze;
using cuda::StepLauncher;

namespace {

struct Graph {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ~Graph() {
    if (exec != nullptr) (void)cudaGraphExecDestroy(exec);
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
  }
  void end(cudaStream_t stream) {
    CHECK_OK(cudaStreamEndCapture(stream, &graph));
    if (graph != nullptr) CHECK_OK(cudaGraphInstantiate(&exec, graph, 0));
  }
};

std::vector<Spec> make_specs(int count, double step = -1, bool strided = false) {
  std::vector<Spec> specs(static_cast<size_t>(count));
  for (size_t i = 0; i < specs.size(); ++i) {
    Spec& spec = specs[i];
    spec.sizes = {1 + static_cast<int64_t>(i % 7)};
    if (i % 4 == 3) spec.param = spec.grad = spec.state = spec.sum = DType::f64;
    if (strided && i % 5 == 4) {
      spec.sizes = {2, 3};
      for (auto& strides : spec.strides) strides = {5, 1};
    }
    if (step >= 0) spec.step = step + static_cast<double>(i);
    spec.hyper = static_cast<int>(i % 3);
  }
  return specs;
}

}  // namespace

namespace {
// The host's vectors are gone when the graph runs, and the launcher has done other work.
void capture_steps(bool strided) {
  for (const int count : {3, 400, 1500}) {
    if (small() && count > 400) continue;
    Case note("%d tensors", count);
    Problem problem(kIndex<Adam>, make_specs(count, -1, strided), {3, 3, 3});
    auto hypers = std::make_unique<std::vector<Hyper<Adam>>>();
    for (int h = 0; h < 3; ++h) hypers->push_back(hyper_of<Adam>({.penalty = h == 1}, h, 1));
    const std::vector<Hyper<Adam>> kept = *hypers;
    StepLauncher launcher;
    Stream stream;
    // A table exists before the capture: the graph must not read it.
    step_and_compare(problem, kept, __FILE__, __LINE__, launcher, 1, stream);
    Graph graph;
    emulator::reset_launch_count();
    {
      auto work = std::make_unique<std::vector<TensorWork>>(problem.device);
      CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      CHECK_OK(launch(launcher, {*work, 2}, *hypers, {}, stream));
      graph.end(stream);
      hypers.reset();
    }
    CHECK(problem.untouched());
    Problem other(kIndex<Adam>, make_specs(count + 600), {3, 3, 3}, 9);
    step_and_compare(other, kept, __FILE__, __LINE__, launcher, 3, stream);
    for (int replay = 0; replay < 2; ++replay) {
      CHECK_OK(cudaGraphLaunch(graph.exec, stream));
      CHECK_OK(cudaStreamSynchronize(stream));
      reference(problem, kept);
      problem.check(__FILE__, __LINE__);
    }
    // 32 KB of about 100 bytes a tensor.
    CHECK((emulator::launch_count(0) > 3) == (count > 300));
  }
}
}  // namespace
TEST(captured_steps) { capture_steps(false); }
TEST(captured_strided_steps) { capture_steps(true); }

namespace {
// As many hypers as tensors, all captured: they are part of what must fit.
void capture_hypers(bool both_widths) {
  const int count = small() ? 150 : 800;
  std::vector<Spec> specs(static_cast<size_t>(count));
  std::vector<Hyper<Adam>> hypers;
  for (int i = 0; i < count; ++i) {
    Spec& spec = specs[static_cast<size_t>(i)];
    spec.sizes = {1 + i % 7};
    if (both_widths && i % 2 == 1) spec.param = spec.grad = spec.state = DType::f64;
    spec.hyper = i;
    hypers.push_back(hyper_of<Adam>({.penalty = i % 2 == 0}, i, 1 + i));
  }
  Problem problem(kIndex<Adam>, specs, std::vector<uint32_t>(hypers.size(), 3));
  StepLauncher launcher;
  Stream stream;
  Graph graph;
  CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  CHECK_OK(launch(launcher, {problem.device, 1}, hypers, {}, stream));
  graph.end(stream);
  CHECK_OK(cudaGraphLaunch(graph.exec, stream));
  CHECK_OK(cudaStreamSynchronize(stream));
  reference(problem, hypers);
  problem.check(__FILE__, __LINE__);
}
}  // namespace
TEST(captured_hypers) { capture_hypers(false); }
TEST(captured_hypers_of_both_widths) { capture_hypers(true); }

// Counts in device memory advance at every replay, and the arguments follow them.
TEST(captured_counts) {
  for (const int count : {5, 400}) {
    Problem problem(kIndex<Adam>, make_specs(count, 0), {3, 3, 3});
    std::vector<DeviceHyper<Adam>> hypers;
    for (int h = 0; h < 3; ++h) {
      DeviceHyper<Adam> hyper = {};
      hyper.options = options_of<Adam>({}, h);
      hypers.push_back(hyper);
    }
    Stream stream;
    StepLauncher launcher;
    {
      // Its counter cannot be allocated while a graph is captured.
      CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      CHECK_CODE(launch(launcher, {problem.device, 1}, hypers, {}, stream),
                 cudaErrorStreamCaptureUnsupported);
      Graph nothing;
      nothing.end(stream);
      CHECK_OK(cudaGraphLaunch(nothing.exec, stream));
      CHECK(problem.untouched());
    }
    const auto expect_step = [&] {
      std::vector<Hyper<Adam>> own;
      for (size_t i = 0; i < problem.host.size(); ++i) {
        const Adam::Options& o = hypers[static_cast<size_t>(problem.device[i].hyper)].options;
        own.push_back(make_hyper<Adam>(o, {.step = problem.step_of(i) + 1}));
        problem.host[i].hyper = static_cast<int32_t>(i);
      }
      reference(problem, own);
    };
    expect_step();
    CHECK_OK(launch(launcher, {problem.device, 1}, hypers, {}, stream));
    CHECK_OK(cudaStreamSynchronize(stream));
    problem.check(__FILE__, __LINE__);
    Graph graph;
    CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK_OK(launch(launcher, {problem.device, 1}, hypers, {}, stream));
    graph.end(stream);
    for (int replay = 0; replay < 3; ++replay) {
      expect_step();
      CHECK_OK(cudaGraphLaunch(graph.exec, stream));
      CHECK_OK(cudaStreamSynchronize(stream));
      problem.check(__FILE__, __LINE__);
      CHECK(problem.step_of(0) == 2 + replay);
      CHECK(problem.step_of(problem.host.size() - 1) == 2 + replay + count - 1);
    }
  }
}

}  // namespace capture_tests
