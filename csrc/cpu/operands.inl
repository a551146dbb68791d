// Between memory and arithmetic: strided gathers and the tiles that operands pass through when
// memory does not already hold an array of the arithmetic type. Included by optimizer_loops.inl,
// once per instruction set.

#include "convert.inl"

namespace BRAZE_ISA {

constexpr int64_t kTile = 512;

template <class S>
S* at(const Operand& operand, int64_t begin) {
  return static_cast<S*>(operand.data) + begin;
}

template <class T>
BRAZE_TARGET void load_linear(const Operand& operand, int64_t begin, int64_t n, T* out) {
  switch (operand.dtype) {
    case DType::f32: {
      const float* in = at<const float>(operand, begin);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
      return;
    }
    case DType::f64: {
      const double* in = at<const double>(operand, begin);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
      return;
    }
    default: {
      float buffer[kTile];
      float* wide = buffer;
      if constexpr (std::is_same_v<T, float>) wide = out;
      if (operand.dtype == DType::bf16) {
        widen(at<Bf16>(operand, begin), wide, n);
      } else {
        widen(at<F16>(operand, begin), wide, n);
      }
      if constexpr (!std::is_same_v<T, float>) {
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(wide[i]);
      }
    }
  }
}

template <class T>
BRAZE_TARGET void store_linear(const Operand& operand, int64_t begin, int64_t n, const T* in) {
  switch (operand.dtype) {
    case DType::f32: {
      float* out = at<float>(operand, begin);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
      return;
    }
    case DType::f64: {
      double* out = at<double>(operand, begin);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(in[i]);
      return;
    }
    default: {
      float buffer[kTile];
      const float* wide = buffer;
      if constexpr (std::is_same_v<T, float>) {
        wide = in;
      } else {
        for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<float>(in[i]);
      }
      if (operand.dtype == DType::bf16) {
        narrow(wide, at<Bf16>(operand, begin), n);
      } else {
        narrow(wide, at<F16>(operand, begin), n);
      }
    }
  }
}

// Walks elements [begin, begin + n) of a strided operand as runs along the innermost dimension.
class Runs {
 public:
  Runs(const TensorWork& t, const int64_t* strides, int64_t begin, int64_t n)
      : t_(t), strides_(strides), left_(n) {
    for (int d = t.ndim - 1; d >= 0; --d) {
      index_[d] = begin % t.sizes[d];
      begin /= t.sizes[d];
      offset_ += index_[d] * strides[d];
    }
  }
  bool next(int64_t& offset, int64_t& length) {
    if (left_ == 0) return false;
    offset = offset_;
    if (t_.ndim == 0) {
      left_ = 0;
      length = 1;
      return true;
    }
    int d = t_.ndim - 1;
    length = std::min(left_, t_.sizes[d] - index_[d]);
    left_ -= length;
    offset_ += length * strides_[d];
    index_[d] += length;
    for (; d >= 0 && index_[d] == t_.sizes[d]; --d) {
      offset_ -= index_[d] * strides_[d];
      index_[d] = 0;
      if (d > 0) {
        ++index_[d - 1];
        offset_ += strides_[d - 1];
      }
    }
    return true;
  }
  int64_t stride() const { return t_.ndim == 0 ? 1 : strides_[t_.ndim - 1]; }

 private:
  const TensorWork& t_;
  const int64_t* strides_;
  int64_t left_;
  int64_t offset_ = 0;
  int64_t index_[kMaxDims] = {};
};

template <class Scalar>
inline void gather(Runs runs, const void* data, Scalar* out) {
  const Scalar* in = static_cast<const Scalar*>(data);
  const int64_t stride = runs.stride();
  for (int64_t offset, length; runs.next(offset, length); out += length) {
    for (int64_t i = 0; i < length; ++i) out[i] = in[offset + i * stride];
  }
}

template <class Scalar>
inline void scatter(Runs runs, void* data, const Scalar* in) {
  Scalar* out = static_cast<Scalar*>(data);
  const int64_t stride = runs.stride();
  for (int64_t offset, length; runs.next(offset, length); in += length) {
    for (int64_t i = 0; i < length; ++i) out[offset + i * stride] = in[i];
  }
}

template <class T>
BRAZE_TARGET void load_strided(const TensorWork& t, const Operand& operand, int64_t begin,
                               int64_t n, T* out) {
  const Runs runs(t, operand.strides, begin, n);
  alignas(64) unsigned char packed[kTile * sizeof(double)];
  switch (operand.dtype) {
    case DType::f32: gather(runs, operand.data, reinterpret_cast<float*>(packed)); break;
    case DType::f64: gather(runs, operand.data, reinterpret_cast<double*>(packed)); break;
    default: gather(runs, operand.data, reinterpret_cast<uint16_t*>(packed)); break;
  }
  load_linear<T>({packed, nullptr, operand.dtype}, 0, n, out);
}

template <class T>
BRAZE_TARGET void store_strided(const TensorWork& t, const Operand& operand, int64_t begin,
                                int64_t n, const T* in) {
  const Runs runs(t, operand.strides, begin, n);
  alignas(64) unsigned char packed[kTile * sizeof(double)];
  store_linear<T>({packed, nullptr, operand.dtype}, 0, n, in);
  switch (operand.dtype) {
    case DType::f32: scatter(runs, operand.data, reinterpret_cast<const float*>(packed)); break;
    case DType::f64: scatter(runs, operand.data, reinterpret_cast<const double*>(packed)); break;
    default: scatter(runs, operand.data, reinterpret_cast<const uint16_t*>(packed)); break;
  }
}

// One operand's elements as an array of T: in place where memory already is that, else a tile that
// is written back.
template <class T>
class View {
 public:
  static constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;
  static bool in_place(const TensorWork& t, const Operand& operand) {
    return t.linear && operand.data != nullptr && operand.dtype == kDType;
  }
  // read: the old values are needed.
  BRAZE_TARGET T* open(const TensorWork& t, const Operand& operand, int64_t begin, int64_t n,
                       bool read) {
    if (in_place(t, operand)) return static_cast<T*>(operand.data) + begin;
    if (read) {
      if (operand.data == nullptr) {
        for (int64_t i = 0; i < n; ++i) tile_[i] = T(0);
      } else if (t.linear) {
        load_linear<T>(operand, begin, n, tile_);
      } else {
        load_strided<T>(t, operand, begin, n, tile_);
      }
    }
    return tile_;
  }
  BRAZE_TARGET void close(const TensorWork& t, const Operand& operand, int64_t begin, int64_t n) {
    if (in_place(t, operand)) return;
    if (t.linear) {
      store_linear<T>(operand, begin, n, tile_);
    } else {
      store_strided<T>(t, operand, begin, n, tile_);
    }
  }

  T* scratch() { return tile_; }

 private:
  alignas(64) T tile_[kTile];
};

}  // namespace BRAZE_ISA
