#include "batch_norm_cpu.h"

#include "batch_norm_kernels.h"
#include "instruction_set.h"
#include "parallel.h"

namespace braze::cpu {
namespace {

struct Kernels {
  decltype(&baseline::statistics) statistics;
  decltype(&baseline::finish_statistics) finish_statistics;
  decltype(&baseline::combine) combine;
  decltype(&baseline::from_running) from_running;
  decltype(&baseline::apply) apply;
  decltype(&baseline::reduce) reduce;
  decltype(&baseline::finish_reduce) finish_reduce;
  decltype(&baseline::coefficients) coefficients;
  decltype(&baseline::apply_grad) apply_grad;
};

#define BRAZE_KERNELS(isa)                                                                    \
  {isa::statistics, isa::finish_statistics, isa::combine,      isa::from_running, isa::apply, \
   isa::reduce,     isa::finish_reduce,     isa::coefficients, isa::apply_grad}
const Kernels kKernels[] = BRAZE_FOR_EACH_SET(BRAZE_KERNELS);
const Kernels& active() { return kKernels[active_instruction_set()]; }

// Counts the batch and makes `momentum` the factor to use.
void count_batch(BatchNormChannels& channels) {
  if (channels.batches_tracked == nullptr) return;
  ++*channels.batches_tracked;
  if (channels.cumulative) {
    channels.momentum = 1 / static_cast<double>(*channels.batches_tracked);
  }
}

// Running statistics are constants: their coefficients need no sums.
bool needs_sums(const BackwardArgs& a) {
  bool needed = a.batch_statistics || a.sums != nullptr;
  for (const InputGradient& grad : a.grad) {
    needed = needed || grad.grad_weight != nullptr || grad.grad_bias != nullptr;
  }
  return needed;
}

// Where reduce leaves d, the gradient of the normalised value, for apply_grad; null: nowhere,
// because d is dy, or as cheap to compute again as to read, or because memory would round it.
void* place_to_keep(const BackwardArgs& a) {
  const Activation act = a.activation;
  const bool selects = act == Activation::relu || act == Activation::relu6;
  const bool wide = a.shape.dtype == DType::f32 || a.shape.dtype == DType::f64;
  const bool exact = wide || selects || act == Activation::identity;
  if ((act == Activation::identity && a.dy2 == nullptr) || !exact || !needs_sums(a)) return nullptr;
  if (a.grad_residual != nullptr) return a.grad_residual;
  const bool of_inputs = a.dy2 == nullptr && a.residual == nullptr && a.mask == nullptr;
  if (of_inputs && (selects || act == Activation::hardswish)) return nullptr;
  return a.grad[0].dx != nullptr ? a.grad[0].dx : a.grad[1].dx;
}

// The arguments of apply_grad where d has been kept.
BackwardArgs from_kept(BackwardArgs a, const void* kept) {
  a.dy = kept;
  a.dy2 = a.residual = nullptr;
  a.mask = nullptr;
  a.grad_residual = nullptr;
  a.activation = Activation::identity;
  return a;
}

void reduce_and_keep(const BackwardArgs& args, void* workspace, int threads, void* kept) {
  const Geometry g(args.shape);
  const Kernels& kernels = active();
  double* parts = needs_sums(args) ? static_cast<double*>(workspace) : nullptr;
  const int64_t units = parts != nullptr ? g.units() : 0;
  in_parallel(
      threads_for(args.shape.numel(), units, threads), units,
      [&](int64_t begin, int64_t end) { kernels.reduce(args, g, begin, end, parts, kept); },
      args.shape.c,
      [&](int64_t begin, int64_t end) { kernels.finish_reduce(args, g, parts, begin, end); });
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
      [&](int64_t begin, int64_t end) { kernels.finish_statistics(a, g, parts, begin, end); });
}

void combine(const CombineArgs& args) {
  CombineArgs a = args;
  count_batch(a.channels);
  active().combine(a);
}

void from_running(const FromRunningArgs& args) { active().from_running(args); }

void apply(const ApplyArgs& args, int threads) {
  const Tiles tiles(args.shape);
  const Kernels& kernels = active();
  in_parallel(threads_for(args.shape.numel(), tiles.count, threads), tiles.count,
              [&](int64_t begin, int64_t end) { kernels.apply(args, tiles, begin, end); });
}

void reduce(const BackwardArgs& args, void* workspace, int threads) {
  reduce_and_keep(args, workspace, threads, nullptr);
}

void backward(const BackwardArgs& args, void* workspace, int threads) {
  void* kept = place_to_keep(args);
  reduce_and_keep(args, workspace, threads, kept);
  const BackwardArgs rest = kept != nullptr ? from_kept(args, kept) : args;
  if (rest.writes_elements()) apply_grad(rest, threads);
}

void coefficients(const CoefficientsArgs& args) { active().coefficients(args); }

void apply_grad(const BackwardArgs& args, int threads) {
  const Tiles tiles(args.shape);
  const Kernels& kernels = active();
  in_parallel(threads_for(args.shape.numel(), tiles.count, threads), tiles.count,
              [&](int64_t begin, int64_t end) { kernels.apply_grad(args, tiles, begin, end); });
}

}  // namespace braze::cpu
