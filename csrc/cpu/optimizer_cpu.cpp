#include "optimizer_cpu.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "../math/convert.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace braze::cpu {
namespace {

// The same loops for each instruction set; which one runs is decided when the process starts, never
// at build time.
#define BRAZE_ISA baseline
#define BRAZE_TARGET
#include "optimizer_loops.inl"
#undef BRAZE_ISA
#undef BRAZE_TARGET

#if defined(__x86_64__)
#define BRAZE_F16C
#define BRAZE_ISA avx2
#define BRAZE_TARGET __attribute__((target("avx2,fma,f16c")))
#include "optimizer_loops.inl"
#undef BRAZE_ISA
#undef BRAZE_TARGET

#if defined(__clang__)
#define BRAZE_AVX512_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#else  // gcc prefers half-width vectors unless told otherwise
#define BRAZE_AVX512_TARGET \
  "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
#define BRAZE_AVX512
#define BRAZE_ISA avx512
#define BRAZE_TARGET __attribute__((target(BRAZE_AVX512_TARGET)))
#include "optimizer_loops.inl"
#undef BRAZE_ISA
#undef BRAZE_TARGET

#define BRAZE_AVX512BF16
#define BRAZE_ISA avx512_bf16
#define BRAZE_TARGET __attribute__((target(BRAZE_AVX512_TARGET ",avx512bf16")))
#include "optimizer_loops.inl"
#undef BRAZE_ISA
#undef BRAZE_TARGET
#undef BRAZE_AVX512BF16
#undef BRAZE_AVX512
#undef BRAZE_F16C
#endif

struct Kernels {
  const char* name;
  void (*adam)(const TensorWork&, const AdamHyper&, int64_t, int64_t);
  void (*sgd)(const TensorWork&, const SgdHyper&, int64_t, int64_t);
  void (*fold)(const TensorWork&, const FoldHyper&, int64_t, int64_t);
};

std::vector<Kernels> available_kernels() {
  std::vector<Kernels> sets = {{"baseline", baseline::adam, baseline::sgd, baseline::fold}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    sets.push_back({"avx2", avx2::adam, avx2::sgd, avx2::fold});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      sets.push_back({"avx512", avx512::adam, avx512::sgd, avx512::fold});
      if (__builtin_cpu_supports("avx512bf16")) {
        sets.push_back({"avx512_bf16", avx512_bf16::adam, avx512_bf16::sgd, avx512_bf16::fold});
      }
    }
  }
#endif
  return sets;
}

Kernels& active() {
  static Kernels kernels = available_kernels().back();
  return kernels;
}

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

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& kernels : available_kernels()) names.emplace_back(kernels.name);
  return names;
}

std::string instruction_set() { return active().name; }

bool set_instruction_set(const std::string& name) {
  for (const Kernels& kernels : available_kernels()) {
    if (name == kernels.name) {
      active() = kernels;
      return true;
    }
  }
  return false;
}

}  // namespace braze::cpu
