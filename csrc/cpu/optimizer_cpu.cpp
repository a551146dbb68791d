#include "optimizer_cpu.h"

#include <omp.h>

#include <atomic>

#include "instruction_set.h"
#include "optimizer_loops.h"
#include "parallel.h"

namespace braze::cpu {
namespace {

#define BRAZE_LOOPS_OF(set) &set::optimizer_loops
constexpr const OptimizerLoops* kLoops[] = BRAZE_FOR_EACH_SET(BRAZE_LOOPS_OF);

// The batches of one thread. On its own cache line: every thread counts here.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// body(chunk) for each of the list. A thread has the same stretch of batches in every call, so that
// its data is still in its cache; when it is through, it takes batches from the others, so that a
// thread held up elsewhere delays one batch, not half of the call.
template <class Body>
void for_each_chunk(const ChunkList& list, int threads, const Body& body) {
  const auto do_batch = [&](int64_t batch) {
    for (int64_t c = list.batches[batch]; c < list.batches[batch + 1]; ++c) body(c);
  };
  const int64_t batches = list.num_batches();
  threads = threads_for(list.cost, batches, threads);
  if (threads == 1) {
    for (int64_t b = 0; b < batches; ++b) do_batch(b);
    return;
  }
  std::vector<Share> shares(static_cast<size_t>(threads));
  for (int64_t t = 0; t < threads; ++t) {
    shares[static_cast<size_t>(t)].next = batches * t / threads;
    shares[static_cast<size_t>(t)].end = batches * (t + 1) / threads;
  }
#pragma omp parallel num_threads(threads)
  {
    const size_t own = static_cast<size_t>(omp_get_thread_num());
    for (size_t k = 0; k < shares.size(); ++k) {
      Share& share = shares[(own + k) % shares.size()];
      for (int64_t b; (b = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
        do_batch(b);
      }
    }
  }
}

}  // namespace

void update_tensors(const std::vector<TensorWork>& tensors, const ChunkList& list,
                    const Hypers& hypers, int threads, GradientSums* sums) {
  const auto update = kLoops[active_instruction_set()]->update[hypers.rule];
  for_each_chunk(list, threads, [&](int64_t c) {
    const Chunk& chunk = list.chunks[c];
    update(tensors[chunk.tensor], chunk.begin, chunk.end, hypers,
           sums == nullptr ? nullptr : sums + c);
  });
}

double measure_gradients(const std::vector<TensorWork>& tensors, const ChunkList& list,
                         double weight, bool all, int threads, std::vector<GradientSums>& sums) {
  const auto measure = kLoops[active_instruction_set()]->measure;
  sums.resize(list.chunks.size());
  for_each_chunk(list, threads, [&](int64_t c) {
    const Chunk& chunk = list.chunks[c];
    measure(tensors[chunk.tensor], chunk.begin, chunk.end, weight, all, sums[c]);
  });
  double squares = 0;
  for (const GradientSums& of_chunk : sums) squares += of_chunk.squares;
  return squares;
}

}  // namespace braze::cpu
