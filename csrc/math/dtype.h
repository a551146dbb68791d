// The dtypes that kernels know, the type that memory holds for each, and the one switch over them.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#include "convert.h"

namespace braze {

enum class DType : uint8_t { f32, f64, bf16, f16 };

template <class S>
constexpr DType kDTypeOf = std::is_same_v<S, double>  ? DType::f64
                           : std::is_same_v<S, float> ? DType::f32
                           : std::is_same_v<S, Bf16>  ? DType::bf16
                                                      : DType::f16;

// body(S{}), where S is what memory holds of `dtype`.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // the body is the host's or the device's, as its caller is
#endif
template <class Body>
BRAZE_INLINE decltype(auto) with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(Bf16{});
    default: return body(F16{});
  }
}

}  // namespace braze
