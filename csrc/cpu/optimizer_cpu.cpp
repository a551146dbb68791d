#include "optimizer_cpu.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "../math/convert.h"
#include "instruction_set.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace braze::cpu {
namespace {

#define BRAZE_LOOPS "optimizer_loops.inl"
#include "instruction_sets.inl"

struct Kernels {
  void (*adam)(const TensorWork&, const AdamHyper&, int64_t, int64_t);
  void (*sgd)(const TensorWork&, const SgdHyper&, int64_t, int64_t);
  void (*fold)(const TensorWork&, const FoldHyper&, int64_t, int64_t);
};

#define BRAZE_KERNELS(isa) {isa::adam, isa::sgd, isa::fold}
const Kernels kKernels[] = BRAZE_FOR_EACH_ISA(BRAZE_KERNELS);
const Kernels& active() { return kKernels[active_instruction_set()]; }

// Below this a second thread costs more than it saves.
constexpr int64_t kParallelCost = 32768;

// The batches of one thread. On its own cache line: every thread counts here.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// Each thread has the same stretch of batches in every step, so that its data is still in its
// cache; when it is through, it takes batches from the others, so that a thread held up elsewhere
// delays one batch, not half of the step.
template <class Hyper>
void run(void (*kernel)(const TensorWork&, const Hyper&, int64_t, int64_t),
         const std::vector<TensorWork>& tensors, const ChunkList& list,
         const std::vector<Hyper>& hypers, int threads) {
  const auto run_batch = [&](int64_t batch) {
    for (int64_t c = list.batches[batch]; c < list.batches[batch + 1]; ++c) {
      const Chunk& chunk = list.chunks[c];
      const TensorWork& t = tensors[chunk.tensor];
      kernel(t, hypers[t.hyper], chunk.begin, chunk.end);
    }
  };
  const int64_t batches = list.num_batches();
  threads = static_cast<int>(std::min<int64_t>(threads, batches));
  if (list.cost < kParallelCost || (threads = usable_threads(threads)) == 1) {
    for (int64_t b = 0; b < batches; ++b) run_batch(b);
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
        run_batch(b);
      }
    }
  }
}

}  // namespace

void adam_step(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
               const std::vector<AdamHyper>& hypers, int threads) {
  run(active().adam, tensors, chunks, hypers, threads);
}

void sgd_step(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
              const std::vector<SgdHyper>& hypers, int threads) {
  run(active().sgd, tensors, chunks, hypers, threads);
}

void fold_gradients(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
                    const std::vector<FoldHyper>& hypers, int threads) {
  run(active().fold, tensors, chunks, hypers, threads);
}

}  // namespace braze::cpu
