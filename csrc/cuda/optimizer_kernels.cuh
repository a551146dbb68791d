// The optimizer kernels. One launch updates any number of tensors of any dtype: blocks take chunks
// of the whole list, look the tensor up, and stream through it 16 bytes at a time.
// Formulas: the rules of math/rules.h.
#pragma once
#include "../math/hook.h"
#include "elements.cuh"
#include "last_block.cuh"

namespace braze::cuda {

// --- one vector, or one element ---

// A state that is overwritten is never read: it may hold anything.
template <class Rule>
__device__ __forceinline__ bool reads(uint32_t flags, int k) {
  return Rule::uses(flags, k) &&
         BRAZE_HOOK(reads_momentum, !(Rule::kFirstOverwrites && (flags & kFirst)));
}

template <class Rule, class Access, class T, bool kPlain>
__device__ __forceinline__ void update_at(const Operands& t,
                                          const int64_t (&positions)[kNumColumns],
                                          const typename Rule::template Args<T>& a) {
  using Pack = typename Access::Pack;
  const auto load = [&](int column) {
    return Access::load(t.data[column], t.dtype(column), positions[column]);
  };
  const auto store = [&](int column, const Pack& pack) {
    Access::store(t.data[column], t.dtype(column), positions[column], pack);
  };
  const uint32_t flags = kPlain ? BRAZE_HOOK(plain_flags, t.flags & ~Rule::kRareFlags) : t.flags;
  const bool has_grad = kPlain || t.data[kGrad] != nullptr;
  const bool has_sum = !kPlain && Rule::kUpdatesParam && t.data[kSum] != nullptr;
  Pack param = {}, grad = {}, sum = {}, state[Rule::kStates] = {};
  if constexpr (Rule::kUpdatesParam) param = load(kParam);
  if (has_grad) grad = load(kGrad);
  if (has_sum) sum = load(kSum);
#pragma unroll
  for (int k = 0; k < Rule::kStates; ++k) {
    if (reads<Rule>(flags, k)) state[k] = load(kState0 + k);
  }
#pragma unroll
  for (int j = 0; j < Access::kCount; ++j) {
    T p = T(0), own[Rule::kStates];
    if constexpr (Rule::kUpdatesParam) p = Access::get(param, j);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) own[k] = Access::get(state[k], j);
    // The gradient to apply: grad, the accumulator, or accumulator + weight * grad.
    T g = Access::get(grad, j);
    if constexpr (Rule::kUpdatesParam) {
      if (has_sum) {
        const T total = Access::get(sum, j);
        g = BRAZE_HOOK(grad_and_sum, has_grad)
                ? accumulate_gradient(total, g, a.fold_weight, T(1), false)
                : total;
      }
    }
    update_element<Rule>(p, g, own, a, flags);
    if constexpr (Rule::kUpdatesParam) Access::set(param, j, p);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) Access::set(state[k], j, own[k]);
  }
  if constexpr (Rule::kUpdatesParam) store(kParam, param);
#pragma unroll
  for (int k = 0; k < Rule::kStates; ++k) {
    if (BRAZE_HOOK(stores_state, Rule::uses(flags, k))) store(kState0 + k, state[k]);
  }
}

// --- one chunk ---

template <class Rule, class Access, class T, bool kPlain>
__device__ __forceinline__ void update_vectors(const Operands& t, int64_t begin, int head,
                                               int count,
                                               const typename Rule::template Args<T>& a) {
#pragma unroll 1
  for (int v = static_cast<int>(threadIdx.x); v < BRAZE_HOOK(vector_end, count);
       v += kBlockThreads) {
    const int64_t i = begin + (head + v * Access::kCount);
    const int64_t positions[kNumColumns] = {i, i, i, i, i, i};
    update_at<Rule, Access, T, kPlain>(t, positions, a);
  }
}

// Elements [begin, end): whole 16-byte vectors where all operands have them at the same elements,
// what lies before and after one by one, and everything one by one where strides or alignments
// differ. The arguments are a copy: for all that nvcc knows, stores might change the original.
template <class Rule, class T, bool kPlain>
__device__ __forceinline__ void update_chunk(const Operands& t, int64_t begin, int64_t end,
                                             typename Rule::template Args<T> a) {
  constexpr int kMixed = 4;
  constexpr bool kWide = sizeof(T) == 8;
  const int size = static_cast<int>(end - begin);
  int head = size, count = 0, width = 1;
  const int common = kPlain ? static_cast<int>(t.dtype(kGrad)) : t.common_dtype(kMixed);
  // Operands of several dtypes in double arithmetic are rare, and do not fit the registers.
  if (t.dims == nullptr && (!kWide || common == static_cast<int>(DType::f64))) {
    width = common == kMixed ? Mixed<T>::kCount : 16 >> log2_size(static_cast<DType>(common));
    const int phase = t.vector_phase(begin, width);
    if (BRAZE_HOOK(has_phase, phase >= 0)) {
      head = min((width - phase) & (width - 1), size);
      count = BRAZE_HOOK(vector_count, (size - head) / width);
    }
  }
  if constexpr (kWide) {
    update_vectors<Rule, Uniform<double, T>, T, kPlain>(t, begin, head, count, a);
  } else if (common == static_cast<int>(DType::f32)) {
    update_vectors<Rule, Uniform<float, T>, T, kPlain>(t, begin, head, count, a);
  } else if (common == static_cast<int>(DType::bf16)) {
    update_vectors<Rule, Uniform<Bf16, T>, T, kPlain>(t, begin, head, count, a);
  } else if (common == static_cast<int>(DType::f16)) {
    update_vectors<Rule, Uniform<F16, T>, T, kPlain>(t, begin, head, count, a);
  } else if constexpr (!kPlain) {
    update_vectors<Rule, Mixed<T>, T, kPlain>(t, begin, head, count, a);
  }
  const int vectorised = count * width;
#pragma unroll 1
  for (int k = BRAZE_HOOK(single_begin, static_cast<int>(threadIdx.x));
       k < BRAZE_HOOK(single_end, size - vectorised); k += kBlockThreads) {
    const int64_t i = begin + k + (k < BRAZE_HOOK(head_end, head) ? 0 : vectorised);
    int64_t positions[kNumColumns] = {i, i, i, i, i, i};
    if constexpr (!kPlain) t.locate(i, positions);
    update_at<Rule, Single<T>, T, kPlain>(t, positions, a);
  }
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

// The tensor that a chunk belongs to is the last one that does not begin after it.
template <bool kPlain>
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
  for (int c = 0; c < kNumColumns; ++c) t.data[c] = entry.data[c];
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

template <class Rule>
__device__ inline typename Rule::template Args<double> make_args(const DeviceHyper<Rule>& h,
                                                                 double inv_scale, double step) {
  typename Rule::Options options = h.options;
  read_scalars<Rule>(options, h, std::make_index_sequence<kDeviceFields<Rule>>{});
  StepInputs inputs = h.inputs;
  inputs.grad_scale *= inv_scale;
  inputs.fold_weight *= inv_scale;
  inputs.step = step;
  return Rule::args(options, inputs, WholePower{});
}

__device__ __forceinline__ DType step_dtype(const TensorEntry& entry) {
  return entry.step_is_double ? DType::f64 : DType::f32;
}

// Counts on: by the last block to finish, so that every block has read the old value.
__device__ inline void advance_steps(const StepArgument& argument, bool skipped) {
  if (argument.blocks_done == nullptr) return;
  if (BRAZE_HOOK(not_last, !is_last_block(argument.blocks_done, gridDim.x))) return;
  if (BRAZE_HOOK(skipped, skipped)) return;
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
constexpr int blocks_per_multiprocessor(bool plain) { return plain ? 3 : 2; }

template <class Rule, bool kPlain>
__device__ __forceinline__ void step_chunk(const StepArgument& argument) {
  const auto [entry, now, t, begin, end] =
      find_chunk<kPlain>(argument, argument.chunk_begin + blockIdx.x);
  if (!kPlain && entry.is_double) {
    using Args = typename Rule::template Args<double>;
    const uint32_t at = now.hyper - BRAZE_HOOK(wide_hypers_begin, argument.wide_hypers_begin);
    update_chunk<Rule, double, kPlain>(t, begin, end,
                                       read_section<Args>(argument, argument.wide_hypers + at));
  } else {
    using Args = typename Rule::template Args<float>;
    const uint32_t at = now.hyper - BRAZE_HOOK(hypers_begin, argument.hypers_begin);
    update_chunk<Rule, float, kPlain>(t, begin, end,
                                      read_section<Args>(argument, argument.hypers + at));
  }
}

// Arguments come ready from the host. A block per chunk: the hardware gives the next one to whoever
// is through.
template <class Rule, bool kPlain>
__global__ void __launch_bounds__(kBlockThreads, blocks_per_multiprocessor(kPlain))
    step_kernel(BRAZE_GRID_CONSTANT(StepArgument) argument) {
  step_chunk<Rule, kPlain>(argument);
}

template <class Rule>
__global__ void __launch_bounds__(kBlockThreads, blocks_per_multiprocessor(true))
    small_step_kernel(BRAZE_GRID_CONSTANT(SmallStepArgument) argument) {
  step_chunk<Rule, true>(reinterpret_cast<const StepArgument&>(argument));
}

// Step counts, loss scale or hyper-parameters are in device memory: each block makes the arguments
// it needs.
template <class Rule, bool kPlain>
__global__ void __launch_bounds__(kBlockThreads, blocks_per_multiprocessor(kPlain))
    device_step_kernel(BRAZE_GRID_CONSTANT(StepArgument) argument) {
  BRAZE_SHARED(Prepared<Rule>, prepared, 1);
  const bool skipped =
      argument.found_inf != nullptr && BRAZE_HOOK(found_inf, *argument.found_inf) != 0.0f;
  uint32_t prepared_hyper = 0;
  double prepared_step = -1;
  const int64_t chunk_end = skipped ? argument.chunk_begin : argument.chunk_end;
  for (int64_t chunk = argument.chunk_begin + blockIdx.x; chunk < chunk_end; chunk += gridDim.x) {
    auto [entry, now, t, begin, end] = find_chunk<kPlain>(argument, chunk);
    const auto& hyper = *reinterpret_cast<const DeviceHyper<Rule>*>(
        section(argument, argument.hypers) + (now.hyper - argument.hypers_begin));
    const double step =
        entry.step == nullptr ? hyper.inputs.step : read_scalar(entry.step, step_dtype(entry)) + 1;
    if (BRAZE_HOOK(other_hyper, prepared_hyper != now.hyper) ||
        BRAZE_HOOK(other_step, prepared_step != step)) {
      prepared_hyper = now.hyper;
      prepared_step = step;
      __syncthreads();  // the block is through with the arguments of its previous chunk
      if (threadIdx.x == 0) {
        const double scale = argument.grad_scale == nullptr ? 1.0 : *argument.grad_scale;
        const auto args = make_args(hyper, BRAZE_HOOK(inverse_scale, 1 / scale), step);
        prepared[0].d = args;
        prepared[0].f = rounded(args);
        prepared[0].penalty = penalty_flag(args);
      }
      __syncthreads();
    }
    t.flags |= BRAZE_HOOK(penalty, prepared[0].penalty);
    if (!kPlain && entry.is_double) {
      update_chunk<Rule, double, kPlain>(t, begin, end, prepared[0].d);
    } else {
      update_chunk<Rule, float, kPlain>(t, begin, end, prepared[0].f);
    }
  }
  advance_steps(argument, skipped);
}

}  // namespace braze::cuda
