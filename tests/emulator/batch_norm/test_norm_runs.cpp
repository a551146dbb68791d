// The same bits whoever runs first, replays of a graph, failing calls, memory beyond 2^31 elements,
// and the seeded faults that detectors must find.
#include <cstring>

#include "intercept.h"
#include "norm.h"

namespace run_tests {

using namespace harness;
using namespace norm;

namespace {

Spec joined(DType dtype, bool channels_last) {
  Spec spec{.n = 3, .c = 40, .spatial = 121, .channels_last = channels_last, .dtype = dtype};
  spec.activation = Activation::relu;
  spec.inputs = 2;
  spec.dy2 = true;
  return spec;
}

}  // namespace

TEST(same_bits_in_every_order) {
  using emulator::Order;
  const emulator::Schedule present = emulator::schedule();
  for (const DType dtype : {DType::bf16, DType::f64}) {
    for (const bool channels_last : {true, false}) {
      const Spec spec = joined(dtype, channels_last);
      const Case note("%s", describe(spec));
      std::vector<char> first;
      for (const Order order : {Order::inorder, Order::reverse, Order::random, Order::pct}) {
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
}

// Whole units in rows, images and planes, so many of them that a thread has several batches and a
// rest; each way in which the kernels for them differ.
TEST(plain_units) {
  const OnDevice one(1);
  struct Form {
    int64_t n, c, spatial;
    bool channels_last;
  };
  uint64_t salt = 7000;
  for (const Form& f : {Form{2, 64, 350, true},
                        {2, 136, 70, true},
                        {13, 2, 320, false},
                        {19, 40, 49, false},
                        {11, 24, 36, false},
                        {9, 24, 12, false},
                        {9, 24, 6, false}}) {
    for (const DType dtype : {DType::bf16, DType::f32, DType::f16}) {
      if (small() && dtype == DType::f16) continue;
      for (int k = 0; k < 6; ++k) {
        Spec spec{.n = f.n,
                  .c = f.c,
                  .spatial = f.spatial,
                  .channels_last = f.channels_last,
                  .dtype = dtype};
        spec.salt = salt++;
        spec.activation = k < 2 ? Activation::identity : Activation::relu;
        spec.mask = k >= 4;
        spec.inputs = k == 5 ? 2 : 1;
        spec.residual = k == 1 || k == 4;
        spec.dy2 = k == 1 || k == 5;
        spec.training = k != 0;
        const Case note("%s", describe(spec));
        Problem(spec).check_all();
      }
    }
  }
}

// A group of so many blocks that they merge their sums in two steps.
TEST(many_blocks) {
  for (const int64_t rows : {16600, 20480}) {
    Spec spec{.n = 2, .c = 4, .spatial = rows, .dtype = DType::f64};
    const Case note("%s", describe(spec));
    Problem(spec).check_all();
  }
}

// On a device with one multiprocessor: few blocks, of several rows, columns and splits each.
TEST(few_blocks) {
  const OnDevice one(1);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bool channels_last : {true, false}) {
      Spec spec = joined(dtype, channels_last);
      spec.c = channels_last ? 24 : 2;
      const Case note("%s", describe(spec));
      Problem(spec).check_all();
      spec.inputs = 1;
      spec.mask = true;
      Problem(spec).check_all();
      spec.training = false;
      Problem(spec).check_all();
    }
  }
}

// A graph keeps its tickets from replay to replay.
TEST(replays) {
  Stream stream;
  Spec spec = joined(DType::bf16, true);
  spec.inputs = 1;
  Problem captured(spec), eager(spec);
  const StatisticsArgs statistics = captured.statistics_args(0);
  const ApplyArgs apply = captured.apply_args();
  const BackwardArgs backward = captured.backward_args();
  const Memory forward_memory = memory_for(statistics), backward_memory = memory_for(backward);
  CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  CHECK_OK(cuda::batch_norm_statistics(statistics, forward_memory.scratch, stream));
  CHECK_OK(cuda::batch_norm_apply(apply, stream));
  CHECK_OK(cuda::batch_norm_reduce(backward, backward_memory.scratch, stream));
  CHECK_OK(cuda::batch_norm_apply_grad(backward, stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK_OK(cudaStreamEndCapture(stream, &graph));
  CHECK_OK(cudaGraphInstantiate(&executable, graph, 0));
  CHECK_OK(cudaGraphDestroy(graph));
  for (int replay = 0; replay < 3; ++replay) {
    CHECK_OK(cudaGraphLaunch(executable, stream));
    CHECK_OK(cudaStreamSynchronize(stream));
    eager.check_all();
    *static_cast<int64_t*>(eager.tracked[0].data()) = 4 + replay;
    CHECK(captured.results() == eager.results());
    // Else check_all would count from a number it does not expect.
    *static_cast<int64_t*>(eager.tracked[0].data()) = 3;
  }
  CHECK_OK(cudaGraphExecDestroy(executable));
}

// Whichever call of a launch fails, the launch says so and nothing is written.
TEST(failing_calls) {
  using Launch = std::function<cudaError_t(Problem&, const Memory&, const Memory&)>;
  const Launch launches[] = {
      [](Problem& p, const Memory& m, const Memory&) {
        return cuda::batch_norm_statistics(p.statistics_args(0), m.scratch, nullptr);
      },
      [](Problem& p, const Memory&, const Memory&) {
        return cuda::batch_norm_apply(p.apply_args(), nullptr);
      },
      [](Problem& p, const Memory&, const Memory& m) {
        return cuda::batch_norm_reduce(p.backward_args(), m.scratch, nullptr);
      },
      [](Problem& p, const Memory&, const Memory&) {
        return cuda::batch_norm_apply_grad(p.backward_args(), nullptr);
      }};
  for (const Launch& launch : launches) {
    int calls = 0;
    for (bool failed = true; failed && calls < 20; ++calls) {
      Problem p(joined(DType::f32, true));
      p.set_stats();
      const std::vector<char> before = p.results();
      const Memory forward = memory_for(p.statistics_args(0));
      const Memory backward = memory_for(p.backward_args());
      intercept::fail_call(calls);
      const cudaError_t error = launch(p, forward, backward);
      failed = intercept::failure_happened();
      intercept::fail_call(-1);
      CHECK((error != cudaSuccess) == failed);
      (void)cudaGetLastError();
      CHECK_OK(cudaDeviceSynchronize());
      if (failed) CHECK(p.results() == before);
    }
    CHECK(calls > 1);  // one at least could fail
  }
}

// y = x + 1 at the end of a tensor with more than 2^32 elements, by the blocks that have it. Only
// these run: the others' pages would fill the memory.
TEST(beyond_32_bits) {
  // Many channels, so that few blocks have the end; and a single plane, dealt to 528 blocks.
  for (const Spec& spec :
       {Spec{.n = 257, .c = int64_t{1} << 24, .spatial = 1, .dtype = DType::bf16},
        {.n = 2, .c = 70000, .spatial = 30750, .channels_last = false, .dtype = DType::bf16},
        {.n = 1,
         .c = 1,
         .spatial = int64_t{3972} * 528 * 256 * 8,
         .channels_last = false,
         .dtype = DType::bf16}}) {
    const bool channels_last = spec.channels_last;
    const int64_t c = spec.c;
    if (small() && c == 1) continue;
    const Case note("%s", describe(spec));
    const int64_t numel = spec.n * c * spec.spatial;
    CHECK(numel > (int64_t{1} << 32));
    const Sparse x(static_cast<size_t>(numel) * 2), y(static_cast<size_t>(numel) * 2);
    const Sparse stats(static_cast<size_t>(c) * kStatsRows * 4);
    auto* const numbers = reinterpret_cast<float*>(stats.data());
    const int64_t channels = channels_last ? 128 : 1;
    for (int64_t i = c - channels; i < c; ++i) {
      numbers[kScale * c + i] = 1;
      numbers[kShift * c + i] = 1;
    }
    const int64_t last = numel - 1;
    x.data()[last] = 0x4040;  // 3
    ApplyArgs args;
    args.shape = spec.shape();
    args.input[0] = {x.data(), stats.data()};
    args.y = y.data();
    // The pass goes backwards: its first blocks have the end.
    emulator::set_block_range(0, 1);
    CHECK_OK(cuda::batch_norm_apply(args, nullptr));
    CHECK_OK(cudaDeviceSynchronize());
    emulator::clear_block_range();
    CHECK(y.data()[last] == 0x4080);  // 4
    CHECK(y.data()[last - 1] == 0x3f80);
    const int64_t before = last - channels * spec.spatial;  // of another block
    if (before >= 0) CHECK(y.data()[before] == 0);
  }
}

TEST(seeded_short_buffer) {
  Spec spec;
  spec.channels_last = false;
  Problem p(spec);
  p.x[0] = Array(spec.dtype, spec.n * spec.c * spec.spatial - 1);
  p.x[0].zero();
  const StatisticsArgs args = p.statistics_args(0);
  const Memory memory = memory_for(args);
  CHECK_OK(cuda::batch_norm_statistics(args, memory.scratch, nullptr));
  CHECK_OK(cudaDeviceSynchronize());
}

TEST(seeded_fresh_buffer) {
  Spec spec;
  Problem p(spec);
  p.x[0] = Array(spec.dtype, spec.n * spec.c * spec.spatial);
  const StatisticsArgs args = p.statistics_args(0);
  const Memory memory = memory_for(args);
  CHECK_OK(cuda::batch_norm_statistics(args, memory.scratch, nullptr));
  CHECK_OK(cudaDeviceSynchronize());
  CHECK(p.stats[0].get(0) != 12345);
}

}  // namespace run_tests
