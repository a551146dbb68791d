#include <algorithm>
#include <mutex>
#include <vector>

#include "../math/hook.h"
#include "batch_norm_grid.h"

namespace braze::cuda {
namespace {

// Units of 16 bytes that a block reads of one pixel: a few hundred bytes in a row are all that
// memory wants, and the narrower the slab, the fewer partial results there are.
constexpr int64_t kBlockColumns = 16;
// Fewer units than this keep a thread's loads from overlapping.
constexpr int64_t kMinUnits = 4;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

struct Resident {
  int device;
  const void* kernel;
  int64_t blocks;
};
std::mutex& resident_mutex() {
  static std::mutex mutex;
  return mutex;
}
std::vector<Resident>& resident_list() {
  static std::vector<Resident> list;
  return list;
}

}  // namespace

cudaError_t known_resident_blocks(const void* kernel, int64_t& blocks, bool& known) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(resident_mutex());
  for (const Resident& entry : resident_list()) {
    if (entry.device != device || entry.kernel != kernel) continue;
    blocks = entry.blocks;
    known = true;
  }
  return cudaSuccess;
}

cudaError_t learn_resident_blocks(const void* kernel, int blocks_per_multiprocessor,
                                  int64_t& blocks) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  blocks = int64_t{std::max(multiprocessors, 1)} * std::max(blocks_per_multiprocessor, 1);
  const std::lock_guard lock(resident_mutex());
  resident_list().push_back({device, kernel, blocks});
  return cudaSuccess;
}

cudaError_t make_norm_launch(const ActivationShape& shape, const NormDemand& demand,
                             std::initializer_list<const void*> tensors, NormLaunch& launch) {
  const int64_t lanes = demand.lanes, size = element_size(shape.dtype), vector = 16 / size;
  NormGrid grid = {};
  grid.channels = shape.c;
  grid.length = shape.row();
  grid.mask_row = BRAZE_HOOK(mask_row, divide_up(grid.length, 8));
  grid.channels_last = shape.channels_last;
  grid.aligned = true;
  grid.phase = -1;
  for (const void* tensor : tensors) {
    if (tensor == nullptr) continue;
    const auto phase = static_cast<int32_t>(reinterpret_cast<uintptr_t>(tensor) % 16 /
                                            static_cast<uintptr_t>(size));
    grid.aligned = grid.aligned && BRAZE_HOOK(one_phase, grid.phase == -1 || grid.phase == phase);
    grid.phase = phase;
  }
  grid.phase = std::max(grid.phase, 0);
  grid.moves_to_phase = !shape.channels_last && grid.aligned && BRAZE_HOOK(may_move, !demand.mask);

  int64_t groups, active;
  if (shape.channels_last) {
    const int64_t words = std::max<int64_t>(divide_up(shape.c, lanes), 1);
    grid.words = divide_up(words, divide_up(words, kBlockColumns));
    groups = BRAZE_HOOK(channel_groups, divide_up(words, grid.words));
    grid.rows = shape.n * shape.spatial;
    active = grid.words *
             std::clamp<int64_t>(divide_up(grid.rows, kMinUnits), 1, kNormThreads / grid.words);
    grid.width = static_cast<int32_t>(grid.words * lanes);
  } else {
    // A plane's first and last unit may be partial.
    const bool in_phase = BRAZE_HOOK(phase_zero, grid.phase == 0) &&
                          BRAZE_HOOK(whole_vectors, shape.spatial % vector == 0);
    const int64_t lost = BRAZE_HOOK(moves, grid.moves_to_phase && !in_phase) ? lanes - 1 : 0;
    grid.words = std::max<int64_t>(divide_up(shape.spatial + lost, lanes), 1);
    groups = std::max<int64_t>(shape.c, 1);
    grid.rows = shape.n;
    active = std::clamp<int64_t>(divide_up(grid.rows * grid.words, kMinUnits), 1, kNormThreads);
    grid.width = 1;
  }
  if (shape.numel() == 0) grid.rows = 0;  // no channels: a group, but nothing to read
  const int64_t threads = BRAZE_HOOK(warps, divide_up(active, 32)) * 32;
  // Small blocks run in greater numbers.
  const int64_t resident = demand.resident * (kNormThreads / threads);
  const int64_t units = grid.rows * grid.words;
  // Either one wave that fills the device as good as evenly, or several.
  int64_t splits = groups <= resident / 8 ? resident / groups : divide_up(4 * resident, groups);
  splits =
      std::clamp<int64_t>(splits, 1, std::max<int64_t>(divide_up(units, active * kMinUnits), 1));
  if (demand.reduction)
    splits = std::max(splits, BRAZE_HOOK(least_splits, divide_up(units, active * kMaxRun)));
  if (groups > INT32_MAX / splits) return cudaErrorInvalidConfiguration;
  grid.groups = static_cast<uint32_t>(groups);
  grid.splits = static_cast<uint32_t>(splits);
  grid.active = static_cast<int32_t>(active);
  grid.stride_rows = splits * active / grid.words;
  grid.stride_words = BRAZE_HOOK(stride_words, splits * active % grid.words);
  launch = {grid, static_cast<unsigned>(groups * splits), static_cast<unsigned>(threads)};
  return cudaSuccess;
}

}  // namespace braze::cuda
