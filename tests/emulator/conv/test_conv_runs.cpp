// The same bits whoever runs first, replays of a graph, failing calls, and the seeded faults that
// detectors must find.
#include "convolution.h"
#include "cuda/conv_grid.h"
#include "intercept.h"

namespace conv_run_tests {

using namespace harness;
using namespace convolution;

namespace {

// Several tiles each way.
Spec several(DType dtype, int kernel) {
  Spec spec{.n = 2, .h = 9, .w = 8, .c = 16, .k = 72, .kernel = kernel, .padding = kernel / 2};
  spec.dtype = dtype;
  return spec;
}

template <class Args>
using Launch = cudaError_t (*)(const Args&, const cuda::NormScratch&, cudaStream_t);

// Whichever call of a launch fails, the launch says so and nothing is written.
template <class Args>
void check_failing(Args (Problem::*args_of)(), Launch<Args> launch) {
  int calls = 0;
  for (bool failed = true; failed && calls < 20; ++calls) {
    Problem p(several(DType::f16, 1));
    const std::vector<char> before = p.results();
    const Args args = (p.*args_of)();
    const norm::Memory memory = memory_for(args);
    intercept::fail_call(calls);
    const cudaError_t error = launch(args, memory.scratch, nullptr);
    failed = intercept::failure_happened();
    intercept::fail_call(-1);
    CHECK((error != cudaSuccess) == failed);
    (void)cudaGetLastError();
    CHECK_OK(cudaDeviceSynchronize());
    if (failed) CHECK(p.results() == before);
  }
  CHECK(calls > 1);  // one at least could fail
}

}  // namespace

TEST(same_bits_in_every_order) {
  using emulator::Order;
  const emulator::Schedule present = emulator::schedule();
  for (const int kernel : {1, 3}) {
    if (small() && kernel == 3) continue;
    const Spec spec = several(kernel == 1 ? DType::bf16 : DType::f16, kernel);
    std::vector<char> first;
    for (const Order order : {Order::inorder, Order::reverse, Order::random, Order::pct}) {
      if (small() && order != Order::inorder && order != Order::pct) continue;
      for (uint64_t k = 0; k < (order == Order::random || order == Order::pct ? 3 : 1); ++k) {
        if (small() && k > 0) continue;
        emulator::set_schedule({order, seed() + k, 0.05});
        Problem p(spec);
        p.check_all();
        if (first.empty()) first = p.results();
        CHECK(p.results() == first);
      }
    }
    emulator::set_schedule(present);
  }
}

TEST(launches) {
  Problem p(several(DType::bf16, 1));
  const auto launches_of = [](bool good) {
    CHECK(good);
    const int64_t count = emulator::launch_count(0);
    emulator::reset_launch_count();
    return count;
  };
  launches_of(true);
  CHECK(launches_of(p.check_forward()) == 1);
  CHECK(launches_of(p.check_input_grad()) == 1);
  CHECK(launches_of(p.check_weight_grad()) == 2);
}

// A graph keeps its tickets from replay to replay.
TEST(replays) {
  Stream stream;
  const Spec spec = several(DType::bf16, 1);
  Problem captured(spec), eager(spec);
  const ConvForwardArgs forward = captured.forward_args();
  const ConvInputGradArgs input_grad = captured.input_grad_args();
  const ConvWeightGradArgs weight_grad = captured.weight_grad_args();
  const norm::Memory memories[] = {memory_for(forward), memory_for(input_grad),
                                   memory_for(weight_grad)};
  CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  CHECK_OK(cuda::conv_weight_grad(weight_grad, memories[2].scratch, stream));
  CHECK_OK(cuda::conv_input_grad(input_grad, memories[1].scratch, stream));
  CHECK_OK(cuda::conv_forward(forward, memories[0].scratch, stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK_OK(cudaStreamEndCapture(stream, &graph));
  CHECK_OK(cudaGraphInstantiate(&executable, graph, 0));
  CHECK_OK(cudaGraphDestroy(graph));
  for (int replay = 0; replay < 3; ++replay) {
    CHECK_OK(cudaGraphLaunch(executable, stream));
    CHECK_OK(cudaStreamSynchronize(stream));
    eager.check_all();
    *static_cast<int64_t*>(eager.after.tracked[0].data()) = 4 + replay;
    CHECK(captured.results() == eager.results());
    // Else check_all would count from a number it does not expect.
    *static_cast<int64_t*>(eager.after.tracked[0].data()) = 3;
  }
  CHECK_OK(cudaGraphExecDestroy(executable));
}

TEST(failing_calls) {
  check_failing(&Problem::forward_args, cuda::conv_forward);
  check_failing(&Problem::input_grad_args, cuda::conv_input_grad);
  check_failing(&Problem::weight_grad_args, cuda::conv_weight_grad);
}

// Beyond what the kernels count in 32 bits nothing is launched.
TEST(too_large) {
  Problem p(several(DType::bf16, 1));
  const auto check = [](auto args, auto launch) {
    args.shape.n = int64_t{1} << 31;
    cuda::NormScratchSize size;
    CHECK_CODE(cuda::conv_scratch(args, size), cudaErrorInvalidConfiguration);
    CHECK_CODE(launch(args, cuda::NormScratch{}, nullptr), cudaErrorInvalidConfiguration);
  };
  const auto of = [](auto* launch) { return launch; };
  check(p.forward_args(), of(cuda::conv_forward));
  check(p.input_grad_args(), of(cuda::conv_input_grad));
  check(p.weight_grad_args(), of(cuda::conv_weight_grad));
}

// The last pixel of tensors with 2^32 elements, by the block that has it. Only that one runs: the
// others' pages would fill the memory.
TEST(beyond_32_bits) {
  Spec spec{.n = 1, .h = 1, .w = 1};
  spec.normalised = spec.after_norm = false;
  Problem p(spec);
  const Sparse from(size_t{1} << 33), to(size_t{1} << 33), workspace(size_t{1} << 30);
  const Sparse tickets(size_t{1} << 20);
  const cuda::NormScratch scratch{workspace.data(), reinterpret_cast<unsigned*>(tickets.data())};
  const auto last_block = [&](auto launch, const auto& args) {
    cuda::NormScratchSize size;
    CHECK_OK(cuda::conv_scratch(args, size));
    CHECK(size.workspace <= size_t{1} << 30 && size.tickets <= size_t{1} << 18);
    emulator::set_block_range(0, 0);
    CHECK_OK(launch(args, scratch, nullptr));
    // Blocks take tiles in turn, and a thread adds up so many values of each.
    constexpr uint64_t kTiles = (uint64_t{1} << 29) / cuda::kTilePixels;
    constexpr uint64_t kValues = cuda::kTilePixels * 64 / 8 / cuda::kNormThreads;
    const uint64_t blocks = intercept::last_grid(), block = (kTiles - 1) % blocks;
    if (!CHECK(kTiles * kValues <= blocks * cuda::kMaxRun)) return;
    emulator::set_block_range(block, block + 1);
    CHECK_OK(launch(args, scratch, nullptr));
    CHECK_OK(cudaDeviceSynchronize());
    emulator::clear_block_range();
  };
  const auto large = [](ConvShape shape) {
    shape.n = int64_t{1} << 15;
    shape.h = shape.out_h = shape.w = shape.out_w = 128;
    return shape;
  };
  const size_t last = (size_t{1} << 32) - 1;
  from.data()[last] = 0x4040;  // 3
  for (int64_t i = 0; i < 64; ++i) p.weight.set(i, i % 9 == 0 ? 2 : 0);
  {
    ConvForwardArgs args = p.forward_args();
    args.shape = large(args.shape);
    args.input.x = from.data();
    args.output = to.data();
    last_block(cuda::conv_forward, args);
    CHECK(to.data()[last] == 0x40c0);  // 6
    to.data()[last] = 0;
  }
  {
    ConvInputGradArgs args = p.input_grad_args();
    args.shape = large(args.shape);
    args.grad.d = from.data();
    args.result = to.data();
    last_block(cuda::conv_input_grad, args);
    CHECK(to.data()[last] == 0x40c0);
  }
}

TEST(seeded_short_buffer) {
  const Spec spec;
  Problem p(spec);
  p.before.x[0] = Array(spec.dtype, spec.n * spec.h * spec.w * spec.c - 8);
  p.before.x[0].zero();
  const ConvForwardArgs args = p.forward_args();
  const norm::Memory memory = memory_for(args);
  CHECK_OK(cuda::conv_forward(args, memory.scratch, nullptr));
  CHECK_OK(cudaDeviceSynchronize());
}

TEST(seeded_fresh_buffer) {
  const Spec spec;
  Problem p(spec);
  p.before.x[0] = Array(spec.dtype, spec.n * spec.h * spec.w * spec.c);
  const ConvForwardArgs args = p.forward_args();
  const norm::Memory memory = memory_for(args);
  CHECK_OK(cuda::conv_forward(args, memory.scratch, nullptr));
  CHECK_OK(cudaDeviceSynchronize());
  CHECK(p.after.stats[0].get(0) != 12345);
}

}  // namespace conv_run_tests
