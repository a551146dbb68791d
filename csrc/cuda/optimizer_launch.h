// Launches optimizer steps: plain pointers in, no torch. One launch per call, whatever the number
// of tensors.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../plan/interface.h"
#include "device_table.h"
#include "optimizer_table.h"

namespace braze::cuda {

struct StepWork {
  const std::vector<TensorWork>& tensors;
  int64_t generation;  // another number whenever more than grad, hyper and first has changed
};

// Of one optimizer on one device, which must be current in every call. An error means that nothing
// was launched.
class BRAZE_API StepLauncher {
 public:
  StepLauncher() = default;
  ~StepLauncher();
  StepLauncher(const StepLauncher&) = delete;
  StepLauncher& operator=(const StepLauncher&) = delete;

  // `scale` is for hypers that are made on the device.
  cudaError_t step(const StepWork& work, const Hypers& hypers, const StepScale& scale,
                   cudaStream_t stream);

  // Sums over the gradients of such a step, which are multiplied by `weight`, and accumulators:
  // into scale.sums and `totals`. Without `statistics` squares alone.
  cudaError_t measure(const StepWork& work, const Hypers& hypers, double weight,
                      const StepScale& scale, bool statistics, MeasuredTotals* totals,
                      cudaStream_t stream);

  // Makes later launches process chunks [begin, end) only: for memory that exists in part.
  void limit_chunks(int64_t begin, int64_t end) { only_begin_ = begin, only_end_ = end; }
  size_t bytes_uploaded() const { return table_.bytes_uploaded(); }

 private:
  struct HyperRange {
    uint32_t begin, end;
  };
  template <class Body>
  cudaError_t with_table(const StepWork& work, const Hypers& hypers, const Body& body);
  template <class Run>
  cudaError_t launch(bool needs_counter, bool even_empty, cudaStream_t stream, const Run& run);
  template <class Run>
  cudaError_t launch_range(size_t first, size_t count, bool even_empty, bool capturing,
                           cudaStream_t stream, const Run& run);
  template <class Rule, bool kOnDevice>
  cudaError_t run(size_t used, int64_t chunks, cudaStream_t stream);
  cudaError_t run_measure(bool statistics, int64_t blocks, cudaStream_t stream);
  template <class Kernel>
  cudaError_t resident_blocks(Kernel kernel, int64_t& blocks);
  template <class Rule>
  void make_entries(const StepWork& work);
  template <class Rule, bool kOnDevice>
  void make_now(const StepWork& work, const Hypers& hypers);
  size_t dims_bytes(size_t first, size_t count) const;
  size_t hyper_size(size_t tensor) const;
  HyperRange hyper_range(size_t first, size_t count, bool wide) const;
  size_t place(size_t first, size_t count, bool capturing);

  int64_t generation_ = -1;
  int rule_ = -1;  // what entries_ were made for
  std::vector<TensorEntry> entries_;
  std::vector<int64_t> chunks_before_;  // [tensor], and the total
  std::vector<int64_t> dims_;
  std::vector<uint16_t> plain_dtype_;  // [tensor] the one dtype of its operands, if it is plain
  std::vector<TensorNow> now_;
  std::vector<char> hypers_, wide_hypers_;  // each in the order of the tensors
  size_t narrow_size_ = 0, wide_size_ = 0;
  size_t averages_ = 0;  // tensors that have one
  bool has_steps_ = false, plain_ = false;
  StepArgument argument_;
  DeviceTable table_;
  std::vector<std::pair<const void*, int64_t>> resident_blocks_;  // by kernel
  unsigned int* blocks_done_ = nullptr;
  int64_t only_begin_ = 0, only_end_ = INT64_MAX;
};

}  // namespace braze::cuda
