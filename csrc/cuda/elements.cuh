// From memory to arithmetic and back: 16-byte vectors of any dtype, and single elements at any
// stride.
#pragma once
#include "../math/convert.h"
#include "../math/hook.h"
#include "optimizer_table.h"
#include "ptx.cuh"

namespace braze::cuda {

__device__ __forceinline__ int log2_size(DType dtype) {
  return dtype == DType::f64 ? 3 : dtype == DType::f32 ? 2 : 1;
}

// One tensor's operands, as a block holds them.
struct Operands {
  void* data[kNumColumns];
  const int64_t* dims;  // null: linear
  int ndim;
  uint32_t dtypes;  // 2 bits per column
  uint32_t flags;

  __device__ __forceinline__ DType dtype(int column) const {
    return static_cast<DType>((dtypes >> (2 * column)) & 3);
  }

  // Where each column has logical element i, in elements.
  __device__ __forceinline__ void locate(int64_t i, int64_t (&positions)[kNumColumns]) const {
#pragma unroll
    for (int c = 0; c < kNumColumns; ++c) positions[c] = dims == nullptr ? i : 0;
    if (dims == nullptr) return;
#pragma unroll 1
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t outer = i / dims[d], index = i - outer * dims[d];
#pragma unroll
      for (int c = 0; c < kNumColumns; ++c)
        positions[c] += index * dims[BRAZE_HOOK(stride_column, c + 1) * ndim + d];
      i = outer;
    }
  }

  // One dtype for all but the average, or `otherwise`.
  __device__ __forceinline__ int common_dtype(int otherwise) const {
    int common = -1;
#pragma unroll
    for (int c = 0; c < kAverage; ++c) {
      if (BRAZE_HOOK(absent_operand, data[c] == nullptr)) continue;
      const int mine = static_cast<int>(dtype(c));
      common = common == -1 || common == mine ? mine : otherwise;
      if (common == otherwise) break;
    }
    return common;
  }

  // Place of element `begin` within its 16-byte-aligned vector of `width` elements (a power of
  // two), or -1 if the operands disagree, so that no element starts a vector in all of them.
  __device__ __forceinline__ int vector_phase(int64_t begin, int width) const {
    int phase = -1;
    bool same = true;
#pragma unroll
    for (int c = 0; c < kNumColumns; ++c) {
      if (data[c] == nullptr) continue;
      const uint64_t element = reinterpret_cast<uint64_t>(data[c]) >> log2_size(dtype(c));
      const int mine = static_cast<int>((element + static_cast<uint64_t>(begin)) & (width - 1u));
      same = same && (phase == -1 || phase == mine);
      phase = mine;
    }
    return BRAZE_HOOK(same_phase, same) ? phase : -1;
  }
};

// Sixteen bytes of one dtype; elements are converted one at a time, so that a vector costs four
// registers.
struct Words {
  uint32_t word[4];

  template <class S>
  __device__ __forceinline__ auto get(int j) const {
    if constexpr (sizeof(S) == 8) {
      double value;
      const uint64_t bits = word[2 * j] | static_cast<uint64_t>(word[2 * j + 1]) << 32;
      memcpy(&value, &bits, sizeof(value));
      return value;
    } else if constexpr (sizeof(S) == 4) {
      return float_from_bits(word[j]);
    } else {
      const uint32_t both = word[j / 2];
      return from_storage(
          S{static_cast<uint16_t>(BRAZE_HOOK(lower_half, j % 2 == 0) ? both : both >> 16)});
    }
  }

  template <class S, class T>
  __device__ __forceinline__ void set(int j, T value) {
    if constexpr (sizeof(S) == 8) {
      uint64_t bits;
      memcpy(&bits, &value, sizeof(value));
      word[2 * j] = static_cast<uint32_t>(bits);
      word[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
    } else if constexpr (sizeof(S) == 4) {
      word[j] = bits_from_float(value);
    } else {
      S half;
      to_storage(value, half);
      const uint32_t bits = half.bits;
      word[j / 2] =
          j % 2 == 0 ? (word[j / 2] & 0xffff0000u) | bits : (word[j / 2] & 0xffffu) | bits << 16;
    }
  }
};

// Every operand holds S: one 16-byte access each.
template <class S, class T>
struct Uniform {
  static constexpr int kCount = 16 / sizeof(S);
  using Pack = Words;
  static __device__ __forceinline__ Pack load(const void* data, DType, int64_t i) {
    const uint4 raw = load16(static_cast<const S*>(data) + i);
    return {{raw.x, raw.y, raw.z, raw.w}};
  }
  static __device__ __forceinline__ void store(void* data, DType, int64_t i, const Pack& pack) {
    store16(static_cast<S*>(data) + i,
            make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]));
  }
  static __device__ __forceinline__ T get(const Pack& pack, int j) {
    return static_cast<T>(pack.template get<S>(j));
  }
  static __device__ __forceinline__ void set(Pack& pack, int j, T value) {
    pack.template set<S>(j, value);
  }
  // What get() is once it is stored.
  static __device__ __forceinline__ T stored(const Pack& pack, int j, DType) {
    return get(pack, j);
  }
};

template <class T>
__device__ __forceinline__ T rounded_to(DType dtype, T value) {
  const auto narrow = static_cast<float>(value);
  if (dtype == DType::f64) return value;
  if (dtype == DType::f32) return narrow;
  if (dtype == DType::bf16) return from_storage(Bf16{bf16_from_float(narrow)});
  return from_storage(F16{f16_from_float(narrow)});
}

// One element.
template <class T>
struct Single {
  static constexpr int kCount = 1;
  using Pack = T;
  static __device__ __forceinline__ T load(const void* data, DType dtype, int64_t i) {
    switch (dtype) {
      case DType::f32: return static_cast<T>(static_cast<const float*>(data)[i]);
      case DType::f64: return static_cast<T>(static_cast<const double*>(data)[i]);
      case DType::bf16: return static_cast<T>(from_storage(static_cast<const Bf16*>(data)[i]));
      default: return static_cast<T>(from_storage(static_cast<const F16*>(data)[i]));
    }
  }
  static __device__ __forceinline__ void store(void* data, DType dtype, int64_t i, T value) {
    switch (dtype) {
      case DType::f32: static_cast<float*>(data)[i] = static_cast<float>(value); return;
      case DType::f64: static_cast<double*>(data)[i] = static_cast<double>(value); return;
      case DType::bf16: to_storage(static_cast<float>(value), static_cast<Bf16*>(data)[i]); return;
      default: to_storage(static_cast<float>(value), static_cast<F16*>(data)[i]); return;
    }
  }
  static __device__ __forceinline__ T get(T pack, int) { return pack; }
  static __device__ __forceinline__ void set(T& pack, int, T value) { pack = value; }
  static __device__ __forceinline__ T stored(T pack, int, DType dtype) {
    return rounded_to(dtype, pack);
  }
};

// Operands of several dtypes: four elements each, 16 bytes of fp32.
template <class T>
struct Mixed {
  static constexpr int kCount = 4;
  struct Pack {
    T value[kCount];
  };
  static __device__ __forceinline__ Pack load(const void* data, DType dtype, int64_t i) {
    Pack pack;
    Words words;
    if (dtype == DType::f32) {
      words = Uniform<float, T>::load(data, dtype, i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) pack.value[j] = words.template get<float>(j);
    } else if (dtype == DType::f64) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) pack.value[j] = Single<T>::load(data, dtype, i + j);
    } else {
      const uint64_t raw = *reinterpret_cast<const uint64_t*>(static_cast<const Bf16*>(data) + i);
      words = {{static_cast<uint32_t>(raw), static_cast<uint32_t>(raw >> 32), 0, 0}};
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        pack.value[j] =
            dtype == DType::bf16 ? words.template get<Bf16>(j) : words.template get<F16>(j);
      }
    }
    return pack;
  }
  static __device__ __forceinline__ void store(void* data, DType dtype, int64_t i,
                                               const Pack& pack) {
    Words words = {};
    if (dtype == DType::f32) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) words.template set<float>(j, pack.value[j]);
      Uniform<float, T>::store(data, dtype, i, words);
    } else if (dtype == DType::f64) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) Single<T>::store(data, dtype, i + j, pack.value[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        dtype == DType::bf16 ? words.template set<Bf16>(j, pack.value[j])
                             : words.template set<F16>(j, pack.value[j]);
      }
      *reinterpret_cast<uint64_t*>(static_cast<Bf16*>(data) + i) =
          words.word[0] | static_cast<uint64_t>(words.word[1]) << 32;
    }
  }
  static __device__ __forceinline__ T get(const Pack& pack, int j) { return pack.value[j]; }
  static __device__ __forceinline__ void set(Pack& pack, int j, T value) { pack.value[j] = value; }
  static __device__ __forceinline__ T stored(const Pack& pack, int j, DType dtype) {
    return rounded_to(dtype, pack.value[j]);
  }
};

}  // namespace braze::cuda
