// The passes of batch normalisation as each instruction set has them, for a share of the work.
#pragma once
#include "batch_norm_geometry.h"
#include "sets.h"

namespace braze::cpu {

// clang-format off
BRAZE_IN_SETS(
  void statistics(const StatisticsArgs&, const Geometry&, int64_t begin, int64_t end,
                  double* parts);
  void finish_statistics(const StatisticsArgs&, const Geometry&, const double* parts,
                         int64_t begin, int64_t end);
  void combine(const CombineArgs&);
  void from_running(const FromRunningArgs&);
  void apply(const ApplyArgs&, const Tiles&, int64_t begin, int64_t end);
  // kept: where d is left; null: nowhere.
  void reduce(const BackwardArgs&, const Geometry&, int64_t begin, int64_t end, double* parts,
              void* kept);
  void finish_reduce(const BackwardArgs&, const Geometry&, const double* parts, int64_t begin,
                     int64_t end);
  void coefficients(const CoefficientsArgs&);
  void apply_grad(const BackwardArgs&, const Tiles&, int64_t begin, int64_t end);
)
BRAZE_IN_BF16_SET(
  using avx512::statistics;
  using avx512::finish_statistics;
  using avx512::combine;
  using avx512::from_running;
  void apply(const ApplyArgs&, const Tiles&, int64_t begin, int64_t end);
  void reduce(const BackwardArgs&, const Geometry&, int64_t begin, int64_t end, double* parts,
              void* kept);
  using avx512::finish_reduce;
  using avx512::coefficients;
  void apply_grad(const BackwardArgs&, const Tiles&, int64_t begin, int64_t end);
)
// clang-format on

}  // namespace braze::cpu
