// The optimizer kernels. One launch updates any number of tensors of any dtype: blocks take chunks
// of the whole list, look the tensor up, and stream through it 16 bytes at a time.
// Formulas: the rules of math/rules.h.
#pragma once
#include "../math/gradient.h"
#include "../math/hook.h"
#include "elements.cuh"
#include "last_block.cuh"

namespace braze::cuda {

constexpr uint32_t kAllColumns = (1u << kNumColumns) - 1;
template <bool kAverages>
constexpr uint32_t kStepColumns = kAverages ? kAllColumns : kAllColumns & ~(1u << kAverage);
constexpr uint32_t kMeasuredColumns = 1u << kGrad | 1u << kSum;

// --- one vector, or one element ---

// A state that is overwritten is never read: it may hold anything.
template <class Rule>
__device__ __forceinline__ bool reads(uint32_t flags, int k) {
  return Rule::uses(flags, k) &&
         BRAZE_HOOK(reads_momentum, !(Rule::kFirstOverwrites && (flags & kFirst)));
}

// The gradient to apply where there is an accumulator: that, or with weight * grad added.
template <class T>
__device__ __forceinline__ T with_sum(T g, T sum, T weight, bool has_grad) {
  return has_grad ? accumulate_gradient(sum, g, weight, T(1), false) : sum;
}

template <class T>
__device__ __forceinline__ bool is_finite(T x) {
  return x - x == T(0);
}

// What becomes of elements in a step. kAverages: they may have running averages; in plain tensors,
// all do.
template <class Rule, class T, bool kPlain, bool kAverages>
struct Update {
  // A copy: for all that nvcc knows, stores might change the original.
  typename Rule::template Args<T> args;
  T average_weight;
  bool statistics;
  double* sums;  // shared memory: each thread's of the update's squares, and of the parameter's

  template <class Access>
  __device__ __forceinline__ void at(const Operands& t, const int64_t (&positions)[kNumColumns]) {
    using Pack = typename Access::Pack;
    // An average is fp32 beside 16-bit parameters, else of the parameter's dtype.
    using Wide = std::conditional_t<(Access::kCount > 4), Uniform<float, T>, Access>;
    constexpr int kParts = Access::kCount / Wide::kCount;
    const auto load = [&](int column) {
      return Access::load(t.data[column], t.dtype(column), positions[column]);
    };
    const auto store = [&](int column, const Pack& pack) {
      Access::store(t.data[column], t.dtype(column), positions[column], pack);
    };
    const uint32_t flags = kPlain ? BRAZE_HOOK(plain_flags, t.flags & ~Rule::kRareFlags) : t.flags;
    const bool has_grad = kPlain || t.data[kGrad] != nullptr;
    const bool has_sum = !kPlain && Rule::kUpdatesParam && t.data[kSum] != nullptr;
    const bool averages =
        kAverages && (kPlain || BRAZE_HOOK(has_average, t.data[kAverage] != nullptr));
    const bool first_average = BRAZE_HOOK(first_average, (flags & kFirstAverage) != 0);
    Pack param = {}, grad = {}, sum = {}, state[Rule::kStates] = {};
    typename Wide::Pack average[kParts] = {};
    const auto stored = [&](int j) {
      return BRAZE_HOOK(stored_param, Access::stored(param, j, t.dtype(kParam)));
    };
    if constexpr (Rule::kUpdatesParam) param = load(kParam);
    if (has_grad) grad = load(kGrad);
    if (has_sum) sum = load(kSum);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) {
      if (reads<Rule>(flags, k)) state[k] = load(kState0 + k);
    }
    const auto load_average = [&](int part) {
      if (averages && !first_average) {
        average[part] = Wide::load(t.data[kAverage], t.dtype(kAverage),
                                   positions[kAverage] + part * Wide::kCount);
      }
    };
    if constexpr (kPlain && kAverages) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) load_average(part);
    }
#pragma unroll
    for (int j = 0; j < Access::kCount; ++j) {
      T p = T(0), own[Rule::kStates];
      if constexpr (Rule::kUpdatesParam) p = Access::get(param, j);
      const T before = p;
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k) own[k] = Access::get(state[k], j);
      T g = Access::get(grad, j);
      if constexpr (Rule::kUpdatesParam) {
        if (has_sum) {
          g = with_sum(g, Access::get(sum, j), args.fold_weight,
                       BRAZE_HOOK(grad_and_sum, has_grad));
        }
      }
      update_element<Rule>(p, g, own, args, flags);
      if constexpr (Rule::kUpdatesParam) Access::set(param, j, p);
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k) Access::set(state[k], j, own[k]);
      if (!kPlain && kAverages && statistics) {
        const double old = before, difference = stored(j) - old;
        sums[threadIdx.x] += difference * difference;
        sums[kBlockThreads + threadIdx.x] += old * old;
      }
    }
    if constexpr (Rule::kUpdatesParam) store(kParam, param);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) {
      if (BRAZE_HOOK(stores_state, Rule::uses(flags, k))) store(kState0 + k, state[k]);
    }
    if constexpr (kAverages) {
      if (!averages) return;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if constexpr (!kPlain) load_average(part);  // later, for want of registers
#pragma unroll
        for (int j = 0; j < Wide::kCount; ++j) {
          const T after = stored(part * Wide::kCount + j);
          Wide::set(average[part], j,
                    first_average
                        ? after
                        : average_with(Wide::get(average[part], j), after, average_weight));
        }
        Wide::store(t.data[kAverage], t.dtype(kAverage), positions[kAverage] + part * Wide::kCount,
                    average[part]);
      }
    }
  }
};

// What elements add to a chunk's sums. Products of fp32 are exact in double. kJoins: there is an
// accumulator, and perhaps a gradient; else a gradient alone.
template <class T, bool kStatistics, bool kJoins>
struct Measure {
  T weight;
  double squares = 0;
  T largest = 0;
  int zeros = 0, non_finite = 0;

  template <class Access>
  __device__ __forceinline__ void at(const Operands& t, const int64_t (&positions)[kNumColumns]) {
    const bool has_grad = !kJoins || t.data[kGrad] != nullptr;
    typename Access::Pack grad = {}, sum = {};
    if (has_grad) grad = Access::load(t.data[kGrad], t.dtype(kGrad), positions[kGrad]);
    if constexpr (kJoins) sum = Access::load(t.data[kSum], t.dtype(kSum), positions[kSum]);
#pragma unroll
    for (int j = 0; j < Access::kCount; ++j) {
      const T g = Access::get(grad, j);
      const T value = kJoins ? with_sum(g, Access::get(sum, j), weight, has_grad) : weight * g;
      const double wide = value;
      squares = sizeof(T) == 4 ? fused_multiply_add(wide, wide, squares) : squares + wide * wide;
      if constexpr (kStatistics) {
        largest = larger(value < 0 ? -value : value, largest);
        zeros += value == 0;
        non_finite += !is_finite(value);
      }
    }
  }
};

// --- one chunk ---

template <class Access, int kUnroll, class Body>
__device__ __forceinline__ void for_vectors(const Operands& t, int64_t begin, int head, int count,
                                            Body& body) {
#pragma unroll kUnroll
  for (int v = static_cast<int>(threadIdx.x); v < BRAZE_HOOK(vector_end, count);
       v += kBlockThreads) {
    const int64_t i = begin + (head + v * Access::kCount);
    const int64_t positions[kNumColumns] = {i, i, i, i, i, i, i};
    body.template at<Access>(t, positions);
  }
}

// body.at<Access>() for elements [begin, end): whole 16-byte vectors where all operands have them
// at the same elements, what lies before and after one by one, and everything one by one where
// strides or alignments differ.
template <class T, bool kPlain, int kUnroll, class Body>
__device__ __forceinline__ void for_chunk(const Operands& t, int64_t begin, int64_t end,
                                          Body& body) {
  constexpr int kMixed = 4;
  constexpr bool kWide = sizeof(T) == 8;
  const int size = static_cast<int>(end - begin);
  int head = size, count = 0, width = 1;
  int common = kPlain ? static_cast<int>(t.dtype(kGrad)) : t.common_dtype(kMixed);
  if (!kPlain && !kWide && common == static_cast<int>(DType::f64)) common = kMixed;
  // Operands of several dtypes in double arithmetic are rare, and do not fit the registers.
  if (t.dims == nullptr && (!kWide || common == static_cast<int>(DType::f64))) {
    width = common == kMixed ? Mixed<T>::kCount : 16 >> log2_size(static_cast<DType>(common));
    const int phase = t.vector_phase(begin, width);
    if (BRAZE_HOOK(has_phase, phase >= 0)) {
      head = min((width - phase) & (width - 1), size);
      count = BRAZE_HOOK(vector_count, (size - head) / width);
    }
  }
  const auto vectors = [&]<class Access>(Access) {
    constexpr bool kSeveralDtypes = std::is_same_v<Access, Mixed<T>>;
    for_vectors<Access, kSeveralDtypes ? 1 : kUnroll>(t, begin, head, count, body);
  };
  if constexpr (kWide) {
    vectors(Uniform<double, T>());
  } else if (common == static_cast<int>(DType::f32)) {
    vectors(Uniform<float, T>());
  } else if (common == static_cast<int>(DType::bf16)) {
    vectors(Uniform<Bf16, T>());
  } else if (common == static_cast<int>(DType::f16)) {
    vectors(Uniform<F16, T>());
  } else if constexpr (!kPlain) {
    vectors(Mixed<T>());
  }
  const int vectorised = count * width;
#pragma unroll 1
  for (int k = BRAZE_HOOK(single_begin, static_cast<int>(threadIdx.x));
       k < BRAZE_HOOK(single_end, size - vectorised); k += kBlockThreads) {
    const int64_t i = begin + k + (k < BRAZE_HOOK(head_end, head) ? 0 : vectorised);
    int64_t positions[kNumColumns] = {i, i, i, i, i, i, i};
    if constexpr (!kPlain) t.locate(i, positions);
    body.template at<Single<T>>(t, positions);
  }
}

struct Added {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};
struct Larger {
  __device__ __forceinline__ double operator()(double a, double b) const { return larger(a, b); }
};

// Of the threads' numbers, by a fixed tree; the first thread gets the result.
template <class Combine>
__device__ __forceinline__ double over_block(double* shared, Combine combine) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int half = kBlockThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] = combine(shared[thread], shared[thread + half]);
  }
  return shared[0];
}

// --- the table ---

__device__ __forceinline__ const char* section(const StepArgument& argument, uint32_t offset) {
  const char* base = offset & kResident ? argument.resident : argument.bytes;
  return base + (offset & ~kResident);
}

// Element i of the section. By words, of which nvcc cannot merge the two cases: those of the
// argument come from constant memory.
template <class T>
__device__ __forceinline__ T read_section(const StepArgument& argument, uint32_t offset,
                                          int i = 0) {
  constexpr int kWords = sizeof(T) / 4;
  const auto* placed = reinterpret_cast<const uint32_t*>(argument.bytes + offset) + i * kWords;
  const auto* resident =
      reinterpret_cast<const uint32_t*>(argument.resident + (offset & ~kResident)) + i * kWords;
  uint32_t words[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = offset & kResident ? __ldg(resident + w) : placed[w];
  T result;
  memcpy(&result, words, sizeof(result));
  return result;
}

// A chunk's tensor, and its elements in it.
struct TensorChunk {
  TensorEntry entry;
  TensorNow now;
  Operands operands;
  int64_t begin, end;
};

// The tensor that a chunk belongs to is the last one that does not begin after it. Columns other
// than these are taken as absent.
template <bool kPlain, uint32_t kColumns>
__device__ __forceinline__ TensorChunk find_chunk(const StepArgument& argument, int64_t chunk) {
  int low = 0, high = argument.num_tensors;
  while (BRAZE_HOOK(candidates, high - low) > 1) {
    const int middle = (low + high) / 2;
    const auto entry = read_section<TensorEntry>(argument, argument.entries, middle);
    (entry.first_chunk <= BRAZE_HOOK(wanted_chunk, chunk) ? low : high) = middle;
  }
  const auto entry = read_section<TensorEntry>(argument, argument.entries, low);
  const auto now = read_section<TensorNow>(argument, argument.now, low);
  Operands t;
#pragma unroll
  for (int c = 0; c < kNumColumns; ++c) t.data[c] = kColumns >> c & 1 ? entry.data[c] : nullptr;
  t.data[kGrad] = const_cast<void*>(now.grad);
  t.dims = kPlain || entry.dims < 0
               ? nullptr
               : reinterpret_cast<const int64_t*>(section(argument, argument.dims)) +
                     (entry.dims - BRAZE_HOOK(dims_begin, argument.dims_begin));
  t.ndim = entry.ndim;
  t.dtypes = entry.dtypes | ((now.flags >> kGradDtypeShift) & 3u) << (2 * kGrad);
  t.flags = now.flags;
  const int64_t begin = (chunk - BRAZE_HOOK(first_chunk, entry.first_chunk)) * kChunkElements;
  return {entry, now, t, begin, min(begin + kChunkElements, BRAZE_HOOK(tensor_end, entry.numel))};
}

// --- arguments made on the device ---

template <class Rule>
struct Prepared {
  typename Rule::template Args<float> f;
  typename Rule::template Args<double> d;
  uint32_t penalty;
};

__device__ __forceinline__ double read_scalar(const void* data, DType dtype) {
  return Single<double>::load(data, dtype, 0);
}

__device__ __forceinline__ double read_scalar(const DeviceScalar& source, double otherwise) {
  return source.data == nullptr ? otherwise : read_scalar(source.data, source.dtype);
}

template <class Rule, size_t... j>
__device__ __forceinline__ void read_scalars(typename Rule::Options& options,
                                             const DeviceHyper<Rule>& h,
                                             std::index_sequence<j...>) {
  const auto read = [&](double& option, const DeviceScalar& scalar) {
    option = read_scalar(scalar, option);
  };
  (read(DeviceHyper<Rule>::template field<j>(options), h.scalars[j]), ...);
}

__device__ __forceinline__ double loss_scale(const StepScale& scale) {
  return scale.grad_scale == nullptr ? 1.0 : *scale.grad_scale;
}

__device__ __forceinline__ double norm_of(const StepScale& scale, double squares) {
  return square_root(squares) * BRAZE_HOOK(norm_scale, scale.norm_scale) / loss_scale(scale);
}

// Of all devices.
__device__ __forceinline__ double all_squares(const StepScale& scale) {
  double squares = 0;
#pragma unroll 1
  for (int i = 0; i < BRAZE_HOOK(num_squares, scale.num_squares); ++i) squares += scale.squares[i];
  return squares;
}

__device__ __forceinline__ double clip_factor(const StepScale& scale) {
  if (BRAZE_HOOK(no_clipping, scale.max_norm < 0)) return 1;
  return clip_coefficient(norm_of(scale, all_squares(scale)), scale.max_norm);
}

__device__ __forceinline__ bool is_skipped(const StepScale& scale) {
  if (scale.found_inf != nullptr && BRAZE_HOOK(found_inf, *scale.found_inf) != 0.0f) return true;
  return BRAZE_HOOK(skip_overflow, scale.skip_overflow) && !is_finite(all_squares(scale));
}

template <class Rule>
__device__ inline typename Rule::template Args<double> make_args(const DeviceHyper<Rule>& h,
                                                                 const StepScale& scale,
                                                                 double step) {
  typename Rule::Options options = h.options;
  read_scalars<Rule>(options, h, std::make_index_sequence<kDeviceFields<Rule>>{});
  StepInputs inputs = h.inputs;
  const double inv_scale = BRAZE_HOOK(inverse_scale, 1 / loss_scale(scale));
  inputs.grad_scale *= inv_scale * clip_factor(scale);
  inputs.fold_weight *= inv_scale;
  inputs.step = step;
  return Rule::args(options, inputs, WholePower{});
}

__device__ __forceinline__ DType step_dtype(const TensorEntry& entry) {
  return entry.step_is_double ? DType::f64 : DType::f32;
}

// Counts on: by the last block to finish, so that every block has read the old value.
__device__ inline void advance_steps(const StepArgument& argument) {
  if (argument.blocks_done == nullptr) return;
  if (BRAZE_HOOK(not_last, !is_last_block(argument.blocks_done, gridDim.x))) return;
  if (BRAZE_HOOK(skipped, is_skipped(argument.scale))) return;
  const auto* entries = reinterpret_cast<const TensorEntry*>(section(argument, argument.entries));
  for (int i = static_cast<int>(threadIdx.x); i < BRAZE_HOOK(counted_tensors, argument.num_tensors);
       i += BRAZE_HOOK(tensor_stride, kBlockThreads)) {
    const TensorEntry& entry = entries[i];
    if (entry.step == nullptr) continue;
    Single<double>::store(entry.step, step_dtype(entry), 0,
                          read_scalar(entry.step, step_dtype(entry)) + 1);
  }
}

// --- the kernels ---

// kPlain: every tensor of the launch has a gradient and operands of one dtype other than fp64, all
// linear, and neither accumulator nor a rule's rare flags. Registers decide how many blocks a
// multiprocessor holds, and this saves a third of them.
constexpr int blocks_per_multiprocessor(bool plain, bool averages) {
  return plain && !averages ? 3 : 2;
}

template <bool kStatistics>
constexpr int kUpdateSums = kStatistics ? 2 * kBlockThreads : 1;

template <class Rule, class T, bool kPlain, bool kAverages>
__device__ __forceinline__ void update_chunk(const StepArgument& argument, const TensorChunk& chunk,
                                             const typename Rule::template Args<T>& args,
                                             double* sums) {
  const T weight = sizeof(T) == 8 ? static_cast<T>(argument.average_weight)
                                  : static_cast<T>(argument.narrow_average_weight);
  Update<Rule, T, kPlain, kAverages> update = {args, weight, argument.scale.sums != nullptr, sums};
  for_chunk<T, kPlain, 1>(chunk.operands, chunk.begin, chunk.end, update);
}

__device__ __forceinline__ void write_sum(const StepArgument& argument, int64_t chunk,
                                          SumColumn column, double sum) {
  if (threadIdx.x == 0) argument.scale.sums[column * argument.all_chunks + chunk] = sum;
}

// Around a chunk's update. Only threads themselves read their numbers before the tree does.
template <bool kStatistics>
__device__ __forceinline__ void clear_sums(const StepArgument& argument, double* sums) {
  if (!kStatistics || argument.scale.sums == nullptr) return;
  sums[threadIdx.x] = sums[kBlockThreads + threadIdx.x] = 0;
}

template <bool kStatistics>
__device__ __forceinline__ void write_update(const StepArgument& argument, int64_t chunk,
                                             double* sums) {
  if (!kStatistics || argument.scale.sums == nullptr) return;
  write_sum(argument, chunk, kUpdateSquares, over_block(sums, Added()));
  write_sum(argument, chunk, kParamSquares, over_block(sums + kBlockThreads, Added()));
  __syncthreads();  // the first thread has read what the next chunk's will write
}

template <class Rule, bool kPlain, bool kAverages>
__device__ __forceinline__ void step_chunk(const StepArgument& argument) {
  constexpr bool kStatistics = !kPlain && kAverages;
  BRAZE_SHARED(double, sums, kUpdateSums<kStatistics>);
  const int64_t index = argument.chunk_begin + blockIdx.x;
  const TensorChunk chunk = find_chunk<kPlain, kStepColumns<kAverages>>(argument, index);
  clear_sums<kStatistics>(argument, sums);
  if (!kPlain && chunk.entry.is_double) {
    using Args = typename Rule::template Args<double>;
    const uint32_t at = chunk.now.hyper - BRAZE_HOOK(wide_hypers_begin, argument.wide_hypers_begin);
    update_chunk<Rule, double, kPlain, kAverages>(
        argument, chunk, read_section<Args>(argument, argument.wide_hypers + at), sums);
  } else {
    using Args = typename Rule::template Args<float>;
    const uint32_t at = chunk.now.hyper - BRAZE_HOOK(hypers_begin, argument.hypers_begin);
    update_chunk<Rule, float, kPlain, kAverages>(
        argument, chunk, read_section<Args>(argument, argument.hypers + at), sums);
  }
  write_update<kStatistics>(argument, index, sums);
}

// Arguments come ready from the host. A block per chunk: the hardware gives the next one to whoever
// is through.
template <class Rule, bool kPlain, bool kAverages>
__global__ void __launch_bounds__(kBlockThreads, blocks_per_multiprocessor(kPlain, kAverages))
    step_kernel(BRAZE_GRID_CONSTANT(StepArgument) argument) {
  step_chunk<Rule, kPlain, kAverages>(argument);
}

template <class Rule>
__global__ void __launch_bounds__(kBlockThreads, blocks_per_multiprocessor(true, false))
    small_step_kernel(BRAZE_GRID_CONSTANT(SmallStepArgument) argument) {
  step_chunk<Rule, true, false>(reinterpret_cast<const StepArgument&>(argument));
}

// Step counts, loss scale, norm or hyper-parameters are in device memory: each block makes the
// arguments it needs.
template <class Rule, bool kPlain, bool kAverages>
__global__ void __launch_bounds__(kBlockThreads, blocks_per_multiprocessor(kPlain, kAverages))
    device_step_kernel(BRAZE_GRID_CONSTANT(StepArgument) argument) {
  constexpr bool kStatistics = !kPlain && kAverages;
  BRAZE_SHARED(Prepared<Rule>, prepared, 1);
  BRAZE_SHARED(double, sums, kUpdateSums<kStatistics>);
  uint32_t prepared_hyper = 0;
  double prepared_step = -1;
  // Fewer than 2^31, as TensorEntry has it: a register less.
  const auto chunk_end =
      static_cast<int>(is_skipped(argument.scale) ? argument.chunk_begin : argument.chunk_end);
  for (int index = static_cast<int>(argument.chunk_begin + blockIdx.x); index < chunk_end;
       index += static_cast<int>(gridDim.x)) {
    TensorChunk chunk = find_chunk<kPlain, kStepColumns<kAverages>>(argument, index);
    const uint32_t own_hyper = chunk.now.hyper;
    const auto& hyper = *reinterpret_cast<const DeviceHyper<Rule>*>(
        section(argument, argument.hypers) + (own_hyper - argument.hypers_begin));
    const void* const count = chunk.entry.step;
    const double step =
        count == nullptr ? hyper.inputs.step : read_scalar(count, step_dtype(chunk.entry)) + 1;
    if (BRAZE_HOOK(other_hyper, prepared_hyper != own_hyper) ||
        BRAZE_HOOK(other_step, prepared_step != step)) {
      prepared_hyper = own_hyper;
      prepared_step = step;
      __syncthreads();  // the block is through with the arguments of its previous chunk
      if (threadIdx.x == 0) {
        const auto args = make_args(hyper, argument.scale, step);
        prepared[0].d = args;
        prepared[0].f = rounded(args);
        prepared[0].penalty = penalty_flag(args);
      }
      __syncthreads();
    }
    chunk.operands.flags |= BRAZE_HOOK(penalty, prepared[0].penalty);
    clear_sums<kStatistics>(argument, sums);
    if (!kPlain && chunk.entry.is_double) {
      update_chunk<Rule, double, kPlain, kAverages>(argument, chunk, prepared[0].d, sums);
    } else {
      update_chunk<Rule, float, kPlain, kAverages>(argument, chunk, prepared[0].f, sums);
    }
    write_update<kStatistics>(argument, index, sums);
  }
  advance_steps(argument);
}

template <class T, bool kStatistics, bool kJoins>
__device__ __forceinline__ void measure_chunk(const StepArgument& argument, int64_t index,
                                              const TensorChunk& chunk, double* shared) {
  Measure<T, kStatistics, kJoins> found = {static_cast<T>(argument.weight)};
  const bool absent = !kJoins && chunk.operands.data[kGrad] == nullptr;
  for_chunk<T, false, kJoins ? 1 : 4>(chunk.operands, chunk.begin,
                                      BRAZE_HOOK(absent_gradient, absent) ? chunk.begin : chunk.end,
                                      found);
  const auto write = [&](SumColumn column, double mine, auto combine) {
    shared[threadIdx.x] = mine;
    write_sum(argument, index, column, over_block(shared, combine));
    __syncthreads();  // the first thread has read what the next ones will write
  };
  write(kSquares, found.squares, Added());
  if constexpr (kStatistics) {
    write(kLargest, found.largest, Larger());
    write(kZeros, found.zeros, Added());
    write(kNonFinite, found.non_finite, Added());
    write_sum(argument, index, kUpdateSquares, 0);  // until a step says otherwise
    write_sum(argument, index, kParamSquares, 0);
  }
}

// Reads the gradients alone. A block per chunk, and the last of all adds up what the chunks have.
template <bool kStatistics>
__global__ void __launch_bounds__(kBlockThreads)
    measure_kernel(BRAZE_GRID_CONSTANT(StepArgument) argument) {
  BRAZE_SHARED(double, shared, kBlockThreads);
  const int64_t index = argument.chunk_begin + blockIdx.x;
  if (BRAZE_HOOK(has_chunk, index < argument.chunk_end)) {
    const TensorChunk chunk = find_chunk<false, kMeasuredColumns>(argument, index);
    const auto measure = [&](auto joins) {
      constexpr bool kJoins = decltype(joins)::value;
      chunk.entry.is_double
          ? measure_chunk<double, kStatistics, kJoins>(argument, index, chunk, shared)
          : measure_chunk<float, kStatistics, kJoins>(argument, index, chunk, shared);
    };
    chunk.operands.data[kSum] != nullptr ? measure(std::true_type()) : measure(std::false_type());
  }
  if (!is_last_block(argument.blocks_done, BRAZE_HOOK(all_blocks, argument.measured_blocks)))
    return;
  const StepScale& scale = argument.scale;
  double squares = 0;
#pragma unroll 4
  for (int64_t c = argument.measured_begin + static_cast<int>(threadIdx.x);
       c < BRAZE_HOOK(measured_end, argument.measured_end); c += kBlockThreads) {
    squares += scale.sums[kSquares * argument.all_chunks + c];
  }
  shared[threadIdx.x] = squares;
  squares = over_block(shared, Added());
  if (threadIdx.x == 0) {
    *argument.totals = {squares, static_cast<float>(norm_of(scale, squares)),
                        BRAZE_HOOK(finite, is_finite(squares)) ? 0.0f : 1.0f};
  }
}

}  // namespace braze::cuda
