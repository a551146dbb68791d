#include <algorithm>
#include <mutex>
#include <numeric>
#include <vector>

#include "../math/hook.h"
#include "batch_norm_grid.h"

namespace braze::cuda {
namespace {

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

namespace {

// Whole images as rows: planes too small for units of their own, whose lanes keep their channels as
// those of pixels do. Words of the smallest group that has whole channels, or 0 if this is none.
int64_t image_words(const ActivationShape& shape, int64_t vector) {
  if (shape.channels_last || shape.spatial <= vector || shape.spatial % vector == 0) return 0;
  const int64_t words = shape.spatial / std::gcd(shape.spatial, vector);
  return words <= kNormThreads && shape.c * shape.spatial % vector == 0 ? words : 0;
}

int64_t vector_of(const ActivationShape& shape) { return 16 / element_size(shape.dtype); }

}  // namespace

bool is_plain(const ActivationShape& shape, bool mask, NormTensors tensors) {
  const int64_t vector = vector_of(shape), unit = mask ? 8 : vector;
  if (shape.dtype == DType::f64) return false;
  if (shape.row() % unit != 0 && (mask || image_words(shape, vector) == 0)) return false;
  return std::all_of(tensors.begin(), tensors.end(), [](const void* tensor) {
    return reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  });
}

cudaError_t make_norm_launch(const ActivationShape& shape, const NormDemand& demand,
                             NormTensors tensors, NormLaunch& launch) {
  const int64_t lanes = demand.lanes, vector = vector_of(shape), size = 16 / vector;
  NormGrid grid = {};
  grid.channels = shape.c;
  grid.length = shape.row();
  grid.mask_row = BRAZE_HOOK(mask_row, divide_up(grid.length, 8));
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

  const int64_t image = demand.plain && !demand.mask ? image_words(shape, vector) : 0;
  grid.per_lane = shape.channels_last || image != 0;
  grid.share = 1;
  grid.moves_to_phase = !grid.per_lane && grid.aligned && BRAZE_HOOK(may_move, !demand.mask);
  int64_t groups, active, words;
  if (grid.per_lane) {
    if (image != 0) {
      grid.length = shape.c * shape.spatial;
      grid.share = static_cast<int32_t>(shape.spatial);
    }
    const int64_t all = std::max<int64_t>(divide_up(grid.length, lanes), 1);
    words = image != 0 ? image * std::max<int64_t>(kBlockColumns / image, 1)
                       : divide_up(all, divide_up(all, kBlockColumns));
    groups = BRAZE_HOOK(channel_groups, divide_up(all, words));
    grid.rows = image != 0 ? shape.n : shape.n * shape.spatial;
    active = words * std::clamp<int64_t>(divide_up(grid.rows, kMinUnits), 1, kNormThreads / words);
    grid.width = static_cast<int32_t>(words * lanes / grid.share);
  } else {
    // A plane's first and last unit may be partial.
    const bool in_phase = BRAZE_HOOK(phase_zero, grid.phase == 0) &&
                          BRAZE_HOOK(whole_vectors, shape.spatial % vector == 0);
    const int64_t lost = BRAZE_HOOK(moves, grid.moves_to_phase && !in_phase) ? lanes - 1 : 0;
    words = std::max<int64_t>(divide_up(shape.spatial + lost, lanes), 1);
    groups = std::max<int64_t>(shape.c, 1);
    grid.rows = shape.n;
    active = std::clamp<int64_t>(divide_up(grid.rows * words, kMinUnits), 1, kNormThreads);
    grid.width = 1;
  }
  if (shape.numel() == 0) grid.rows = 0;  // no channels: a group, but nothing to read
  const int64_t threads = BRAZE_HOOK(warps, divide_up(active, 32)) * 32;
  // Small blocks run in greater numbers.
  const int64_t resident = demand.resident * (kNormThreads / threads);
  const int64_t units = grid.rows * words;
  // Whole waves, as near as the groups allow: one, or where that leaves blocks idle, up to four.
  const int64_t wave = std::max<int64_t>(resident / groups, 1);
  int64_t splits = groups <= resident / 8 ? wave : std::max<int64_t>(4 * resident / groups, 1);
  splits =
      std::clamp<int64_t>(splits, 1, std::max<int64_t>(divide_up(units, active * kMinUnits), 1));
  if (demand.reduction) {
    const int64_t least = BRAZE_HOOK(least_splits, divide_up(units, active * kMaxRun));
    if (splits < least) splits = divide_up(least, wave) * wave;
  }
  if (groups > INT32_MAX / splits || words > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
  grid.groups = static_cast<uint32_t>(groups);
  grid.splits = static_cast<uint32_t>(splits);
  grid.active = static_cast<int32_t>(active);
  grid.words = static_cast<int32_t>(words);
  grid.stride_words = static_cast<int32_t>(BRAZE_HOOK(stride_words, splits * active % words));
  grid.next_row = grid.per_lane ? 1 : grid.channels;
  grid.next_base = grid.next_row * grid.length;
  grid.stride_rows = splits * active / words * grid.next_row;
  grid.stride_base = grid.stride_rows * grid.length;
  launch = {grid, static_cast<unsigned>(groups * splits), static_cast<unsigned>(threads)};
  return cudaSuccess;
}

}  // namespace braze::cuda
