#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../math/activation.h"
#include "../math/batch_norm.h"
#include "../math/convert.h"
#include "batch_norm_cpu.h"
#include "batch_norm_geometry.h"
#include "instruction_set.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace braze::cpu {
namespace {

#define BRAZE_LOOPS "batch_norm_forward.inl"
#include "instruction_sets.inl"

struct Kernels {
  void (*statistics)(const StatisticsArgs&, const Geometry&, int64_t, int64_t, double*);
  void (*finish)(const StatisticsArgs&, const Geometry&, const double*, int64_t, int64_t);
  void (*combine)(const CombineArgs&);
  void (*from_running)(const FromRunningArgs&);
  void (*apply)(const ApplyArgs&, const Tiles&, int64_t, int64_t);
};

#define BRAZE_KERNELS(isa) \
  {isa::statistics, isa::finish_statistics, isa::combine, isa::from_running, isa::apply}
const Kernels kKernels[] = BRAZE_FOR_EACH_ISA(BRAZE_KERNELS);
const Kernels& active() { return kKernels[active_instruction_set()]; }

// Counts the batch and makes `momentum` the factor to use.
void count_batch(BatchNormChannels& channels) {
  if (channels.batches_tracked == nullptr) return;
  ++*channels.batches_tracked;
  if (channels.cumulative) {
    channels.momentum = 1 / static_cast<double>(*channels.batches_tracked);
  }
}

}  // namespace

size_t batch_norm_workspace(const ActivationShape& shape) { return parts_bytes(Geometry(shape)); }

void statistics(const StatisticsArgs& args, void* workspace, int threads) {
  StatisticsArgs a = args;
  if (a.moments == nullptr) count_batch(a.channels);
  const Geometry g(a.shape);
  const Kernels& kernels = active();
  double* parts = static_cast<double*>(workspace);
  in_parallel(
      threads_for(a.shape.numel(), g.units(), threads), g.units(),
      [&](int64_t begin, int64_t end) { kernels.statistics(a, g, begin, end, parts); }, a.shape.c,
      [&](int64_t begin, int64_t end) { kernels.finish(a, g, parts, begin, end); });
}

void combine(const CombineArgs& args) {
  CombineArgs a = args;
  count_batch(a.channels);
  active().combine(a);
}

void from_running(const FromRunningArgs& args) { active().from_running(args); }

void apply(const ApplyArgs& args, int threads) {
  // A mask's rows are single pixels.
  const Tiles tiles(args.shape, args.mask == nullptr || args.shape.c % 8 == 0);
  const Kernels& kernels = active();
  in_parallel(threads_for(args.shape.numel(), tiles.count, threads), tiles.count,
              [&](int64_t begin, int64_t end) { kernels.apply(args, tiles, begin, end); });
}

}  // namespace braze::cpu
