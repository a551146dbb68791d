#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "../math/hook.h"
#include "optimizer_launch.h"
#include "zeros.h"

namespace braze::cuda {
namespace {

constexpr uint16_t kNeverPlain = 0xffff;

template <class Args>
void append(std::vector<char>& bytes, const Args& args) {
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) % 4 == 0);
  const char* begin = reinterpret_cast<const char*>(&args);
  bytes.insert(bytes.end(), begin, begin + sizeof(Args));
}

size_t align16(size_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

StepLauncher::~StepLauncher() = default;

template <class Rule>
void StepLauncher::make_entries(const StepWork& work) {
  if (BRAZE_HOOK(same_generation, generation_ == work.generation) &&
      BRAZE_HOOK(same_algorithm, rule_ == Rules::index_of<Rule>()))
    return;
  generation_ = work.generation;
  rule_ = Rules::index_of<Rule>();
  entries_.clear();
  dims_.clear();
  plain_dtype_.clear();
  chunks_before_.assign(1, 0);
  has_steps_ = false;
  averages_ = 0;
  for (const TensorWork& t : work.tensors) {
    TensorEntry entry = {};
    const Operand* columns[kNumColumns] = {&t.param,    &t.grad,     &t.sum,    &t.state[0],
                                           &t.state[1], &t.state[2], &t.average};
    bool plain = t.linear && !t.is_double;
    for (int c = 0; c < kNumColumns; ++c) {
      const bool used = c == kGrad      ? false
                        : c < kState0   ? Rule::kUpdatesParam
                        : c == kAverage ? Rule::kIsOptimizer
                                        : c < kState0 + Rule::kStates;
      if (!used || columns[c]->data == nullptr) continue;
      entry.data[c] = columns[c]->data;
      entry.dtypes |= static_cast<uint16_t>(static_cast<int>(columns[c]->dtype) << (2 * c));
      plain = plain && BRAZE_HOOK(column_is_read, c != kSum) &&
              columns[c]->dtype == (c == kAverage ? DType::f32 : t.param.dtype);
      averages_ += c == kAverage;
    }
    entry.step = t.step.data;
    entry.step_is_double = t.step.dtype == DType::f64;
    has_steps_ = has_steps_ || entry.step != nullptr;
    entry.numel = t.numel;
    entry.first_chunk = static_cast<int32_t>(chunks_before_.back());
    entry.ndim = t.ndim;
    entry.is_double = t.is_double;
    entry.dims = -1;
    if (!t.linear) {
      entry.dims = static_cast<int32_t>(dims_.size());
      dims_.insert(dims_.end(), t.sizes, t.sizes + t.ndim);
      for (const Operand* column : columns) {
        const int64_t* strides = column->strides;
        for (int d = 0; d < t.ndim; ++d) dims_.push_back(strides == nullptr ? 0 : strides[d]);
      }
    }
    entries_.push_back(entry);
    plain_dtype_.push_back(plain ? static_cast<uint16_t>(t.param.dtype) : kNeverPlain);
    chunks_before_.push_back(chunks_before_.back() +
                             (t.numel + kChunkElements - 1) / kChunkElements);
  }
}

template <class Rule, bool kOnDevice>
void StepLauncher::make_now(const StepWork& work, const Hypers& table) {
  using Stored = std::conditional_t<kOnDevice, DeviceHyper<Rule>, Hyper<Rule>>;
  const auto* hypers = static_cast<const Stored*>(table.data);
  hypers_.clear();
  wide_hypers_.clear();
  if constexpr (kOnDevice) {
    narrow_size_ = sizeof(Stored);
    wide_size_ = 0;
    for (size_t h = 0; h < table.count; ++h) append(hypers_, hypers[h]);
  } else {
    narrow_size_ = sizeof(hypers->f);
    wide_size_ = sizeof(hypers->d);
    bool any_wide = false;
    for (const TensorEntry& entry : entries_) any_wide = any_wide || entry.is_double;
    for (size_t h = 0; h < table.count; ++h) {
      append(hypers_, hypers[h].f);
      if (any_wide) append(wide_hypers_, hypers[h].d);
    }
  }
  const auto flags_of = [](const Stored& hyper) {
    // Whether there is a penalty only the device knows.
    if constexpr (kOnDevice)
      return Rule::flags(hyper.options);
    else
      return hyper.flags;
  };
  plain_ = BRAZE_HOOK(all_average, averages_ == 0 || averages_ == entries_.size());
  now_.resize(entries_.size());
  for (size_t i = 0; i < entries_.size(); ++i) {
    const TensorWork& t = work.tensors[i];
    const size_t hyper = static_cast<size_t>(t.hyper);
    const uint32_t flags =
        flags_of(hypers[hyper]) | (t.first ? kFirst : 0u) | (t.first_average ? kFirstAverage : 0u);
    const uint32_t dtype = static_cast<uint32_t>(t.grad.dtype);
    now_[i] = {t.grad.data, static_cast<uint32_t>(hyper * hyper_size(i)),
               flags | dtype << kGradDtypeShift};
    plain_ = plain_ && plain_dtype_[i] == dtype && t.grad.data != nullptr &&
             BRAZE_HOOK(no_maximum, !(flags & Rule::kRareFlags));
  }
}

// Elements of dims_ that tensors [first, first + count) use: a stretch, for they come in order.
size_t StepLauncher::dims_bytes(size_t first, size_t count) const {
  if (count == entries_.size()) return dims_.size() * sizeof(int64_t);
  size_t elements = 0;
  for (size_t i = first; i < first + count; ++i) {
    if (entries_[i].dims >= 0) {
      elements += static_cast<size_t>(entries_[i].ndim) * (kNumColumns + 1);
    }
  }
  return elements * sizeof(int64_t);
}

size_t StepLauncher::hyper_size(size_t tensor) const {
  return wide_size_ != 0 && entries_[tensor].is_double ? wide_size_ : narrow_size_;
}

// The bytes of hypers_, or wide_hypers_, that tensors [first, first + count) read.
StepLauncher::HyperRange StepLauncher::hyper_range(size_t first, size_t count, bool wide) const {
  if (count == entries_.size()) {
    return {0, static_cast<uint32_t>((wide ? wide_hypers_ : hypers_).size())};
  }
  HyperRange range{UINT32_MAX, 0};
  for (size_t i = first; i < first + count; ++i) {
    if ((wide_size_ != 0 && entries_[i].is_double) != wide) continue;
    range.begin = std::min(range.begin, now_[i].hyper);
    range.end = std::max(range.end, now_[i].hyper + static_cast<uint32_t>(hyper_size(i)));
  }
  return range.end == 0 ? HyperRange{0, 0} : range;
}

// Fills the argument (and the resident table's image) for tensors [first, first + count). What does
// not fit the argument goes to device memory, what changes least first. Returns the bytes used of
// the argument.
size_t StepLauncher::place(size_t first, size_t count, bool capturing) {
  struct Section {
    const char* data;
    size_t bytes;
    uint32_t* offset;
  };
  argument_.num_tensors = static_cast<int32_t>(count);
  argument_.chunk_begin = std::max(chunks_before_[first], only_begin_);
  argument_.chunk_end = std::min(chunks_before_[first + count], only_end_);
  int32_t dims_begin = 0;
  for (size_t i = first; i < first + count && !dims_.empty(); ++i) {
    if (entries_[i].dims < 0) continue;
    dims_begin = entries_[i].dims;
    break;
  }
  argument_.dims_begin = dims_begin;
  const HyperRange narrow = hyper_range(first, count, false),
                   wide = hyper_range(first, count, true);
  argument_.hypers_begin = narrow.begin;
  argument_.wide_hypers_begin = wide.begin;
  const std::array<Section, 5> sections = {{
      {hypers_.data() + narrow.begin, narrow.end - narrow.begin, &argument_.hypers},
      {wide_hypers_.data() + wide.begin, wide.end - wide.begin, &argument_.wide_hypers},
      {reinterpret_cast<const char*>(now_.data() + first), count * sizeof(TensorNow),
       &argument_.now},
      {reinterpret_cast<const char*>(entries_.data() + first), count * sizeof(TensorEntry),
       &argument_.entries},
      {reinterpret_cast<const char*>(dims_.data() + dims_begin), dims_bytes(first, count),
       &argument_.dims},
  }};
  const auto total = [&](size_t begin, size_t end) {
    size_t bytes = 0;
    for (size_t s = begin; s < end; ++s) bytes += align16(sections[s].bytes);
    return bytes;
  };
  const bool all_fit = total(0, 5) <= kArgumentBytes, changing_fit = total(0, 3) <= kArgumentBytes;
  const size_t resident_from = BRAZE_HOOK(all_resident, all_fit || capturing) ? 5
                               : changing_fit                                 ? 3
                                                                              : 0;
  char* image = table_.image(total(resident_from, 5));
  size_t in_argument = 0, in_image = 0;
  for (size_t s = 0; s < sections.size(); ++s) {
    const bool resident = s >= resident_from;
    size_t& offset = resident ? in_image : in_argument;
    char* to = resident ? image : argument_.bytes;
    if (sections[s].bytes != 0) memcpy(to + offset, sections[s].data, sections[s].bytes);
    *sections[s].offset = static_cast<uint32_t>(offset) | (resident ? kResident : 0u);
    offset += align16(sections[s].bytes);
  }
  return in_argument;
}

// A launch over tensors [first, first + count), by run(bytes of the argument, chunks); where there
// is no chunk only if `even_empty`.
template <class Run>
cudaError_t StepLauncher::launch_range(size_t first, size_t count, bool even_empty, bool capturing,
                                       cudaStream_t stream, const Run& run) {
  const size_t used = place(first, count, capturing);
  const int64_t chunks = argument_.chunk_end - argument_.chunk_begin;
  if (chunks <= 0 && BRAZE_HOOK(counts_nothing, !even_empty)) return cudaSuccess;
  const bool uploads = (argument_.entries & kResident) != 0;
  if (uploads) {
    if (const cudaError_t error = BRAZE_HOOK(upload, table_.upload(stream)); error != cudaSuccess)
      return error;
  }
  argument_.resident = table_.device();
  const cudaError_t error = run(used, std::max<int64_t>(chunks, 1));
  // The launch is on its way, so this is no error of it.
  if (error == cudaSuccess && uploads) (void)table_.mark_read(stream);
  return error;
}

template <class Run>
cudaError_t StepLauncher::launch(bool needs_counter, bool even_empty, cudaStream_t stream,
                                 const Run& run) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaStreamIsCapturing(stream, &status); error != cudaSuccess) {
    return error;
  }
  const bool capturing = status != cudaStreamCaptureStatusNone;
  if (needs_counter && blocks_done_ == nullptr) {
    if (BRAZE_HOOK(capturing, capturing)) return cudaErrorStreamCaptureUnsupported;
    if (const cudaError_t error = take_zeros(1, &blocks_done_); error != cudaSuccess) {
      return error;
    }
  }
  argument_.blocks_done = needs_counter ? blocks_done_ : nullptr;
  argument_.all_chunks = chunks_before_.back();
  const size_t count = entries_.size();
  if (!capturing) return launch_range(0, count, even_empty, false, stream, run);
  // A graph keeps arguments, but would read a table long after it has changed: as many launches as
  // it takes.
  for (size_t first = 0; first < count;) {
    size_t bytes = 5 * 16, end = first;  // of padding
    HyperRange ranges[2] = {{UINT32_MAX, 0}, {UINT32_MAX, 0}};
    for (; end < count; ++end) {
      HyperRange& range = ranges[wide_size_ != 0 && entries_[end].is_double];
      range.begin = std::min(range.begin, now_[end].hyper);
      range.end = std::max(range.end, now_[end].hyper + static_cast<uint32_t>(hyper_size(end)));
      bytes += sizeof(TensorNow) + sizeof(TensorEntry) + dims_bytes(end, 1);
      size_t hypers = 0;
      for (const HyperRange& r : ranges)
        hypers += BRAZE_HOOK(hyper_bytes, r.end == 0 ? 0 : r.end - r.begin);
      if (BRAZE_HOOK(argument_full, bytes + hypers > kArgumentBytes && end > first)) break;
    }
    const cudaError_t error = launch_range(first, end - first, even_empty, true, stream, run);
    if (error != cudaSuccess) return error;
    first = end;
  }
  return cudaSuccess;
}

// body(Rule, whether the hypers are on the device) with the table of this work.
template <class Body>
cudaError_t StepLauncher::with_table(const StepWork& work, const Hypers& hypers, const Body& body) {
  cudaError_t error = cudaErrorInvalidValue;
  Rules::visit(hypers.rule, [&]<class Rule>(Rule) {
    const auto with = [&](auto on_device) {
      make_entries<Rule>(work);
      make_now<Rule, decltype(on_device)::value>(work, hypers);
      error = body(Rule(), on_device);
    };
    if constexpr (Rule::kUpdatesParam) {
      hypers.on_device ? with(std::true_type()) : with(std::false_type());
    } else {
      with(std::false_type());
    }
  });
  return error;
}

cudaError_t StepLauncher::step(const StepWork& work, const Hypers& hypers, const StepScale& scale,
                               cudaStream_t stream) {
  return with_table(work, hypers, [&]<class Rule, class OnDevice>(Rule, OnDevice) {
    argument_.scale = scale;
    argument_.average_weight = hypers.average_weight;
    argument_.narrow_average_weight = static_cast<float>(hypers.average_weight);
    const bool counts = OnDevice::value && has_steps_;
    return launch(counts, counts, stream, [&](size_t used, int64_t chunks) {
      return run<Rule, OnDevice::value>(used, chunks, stream);
    });
  });
}

cudaError_t StepLauncher::measure(const StepWork& work, const Hypers& hypers, double weight,
                                  const StepScale& scale, bool statistics, MeasuredTotals* totals,
                                  cudaStream_t stream) {
  return with_table(work, hypers, [&](auto, auto) {
    argument_.scale = scale;
    argument_.weight = weight;
    argument_.totals = totals;
    argument_.measured_begin = std::max<int64_t>(0, only_begin_);
    argument_.measured_end = std::min(chunks_before_.back(), only_end_);
    const int64_t chunks = argument_.measured_end - argument_.measured_begin;
    argument_.measured_blocks = static_cast<uint32_t>(std::max<int64_t>(chunks, 1));
    return launch(true, chunks <= 0, stream,
                  [&](size_t, int64_t blocks) { return run_measure(statistics, blocks, stream); });
  });
}

}  // namespace braze::cuda
