// Runs gemm.cuh and compares it with double; on the emulator, or compiled by nvcc on a GPU.
//   gemm            the right kernel
//   gemm no_wait    without its wait
//   gemm no_zeros   with numbers in place of the zeros beyond the depth
//   gemm patterns   prints the bits that each instruction gives
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "gemm.cuh"
#include "math/convert.h"

namespace {

using namespace gemm;

uint16_t bits_of(float value, Type type) {
  return type == Type::f16 ? braze::f16_from_float(value) : braze::bf16_from_float(value);
}
float value_of(uint16_t bits, Type type) {
  return type == Type::f16 ? braze::float_from_f16(bits) : braze::float_from_bf16(bits);
}

// Numbers whose products and sums are exact in float: small multiples of 1/8.
std::vector<uint16_t> numbers(size_t count, unsigned seed, Type type) {
  std::vector<uint16_t> result;
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    result.push_back(bits_of((static_cast<float>(seed >> 24) - 128.0f) / 8, type));
  }
  return result;
}

template <class T>
struct OnDevice {
  T* data = nullptr;
  size_t bytes;
  explicit OnDevice(size_t count) : bytes(count * sizeof(T)) {
    (void)cudaMalloc(reinterpret_cast<void**>(&data), bytes);
  }
  explicit OnDevice(const std::vector<T>& from) : OnDevice(from.size()) {
    (void)cudaMemcpy(data, from.data(), bytes, cudaMemcpyHostToDevice);
  }
  ~OnDevice() { (void)cudaFree(data); }
  std::vector<T> read() const {
    std::vector<T> result(bytes / sizeof(T));
    (void)cudaMemcpy(result.data(), data, bytes, cudaMemcpyDeviceToHost);
    return result;
  }
};

template <Type kType, Fault kFault>
int multiply_and_compare() {
  constexpr int m = 128, n = 128, k = 152;
  const std::vector<uint16_t> a = numbers(m * k, 1, kType), b = numbers(k * n, 2, kType);
  const OnDevice<uint16_t> device_a(a), device_b(b);
  const OnDevice<float> device_c(static_cast<size_t>(m) * n);
  const dim3 grid(n / kColumns, m / kRows);
  const cudaError_t error = BRAZE_LAUNCH((gemm_kernel<kType, kFault>), grid, kThreads, 0, nullptr,
                                         device_a.data, device_b.data, device_c.data, n, k);
  if (error != cudaSuccess || cudaDeviceSynchronize() != cudaSuccess) {
    printf("the launch failed: %s\n", cudaGetErrorString(error));
    return 1;
  }
  const std::vector<float> c = device_c.read();
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double expected = 0;
      for (int d = 0; d < k; ++d) {
        expected += static_cast<double>(value_of(a[static_cast<size_t>(i * k + d)], kType)) *
                    value_of(b[static_cast<size_t>(d * n + j)], kType);
      }
      const double got = c[static_cast<size_t>(i * n + j)];
      if (got == expected) continue;
      printf("WRONG element (%d, %d) is %g instead of %g\n", i, j, got, expected);
      return 1;
    }
  }
  printf("right\n");
  return 0;
}

template <Type kType>
int print_patterns() {
  const std::vector<uint16_t> in = numbers(512, 3, kType);
  const OnDevice<uint16_t> device_in(in);
  const OnDevice<uint32_t> device_out(32 * kPatternWords);
  const cudaError_t error =
      BRAZE_LAUNCH(pattern_kernel<kType>, 1, 32, 0, nullptr, device_in.data, device_out.data);
  if (error != cudaSuccess || cudaDeviceSynchronize() != cudaSuccess) return 1;
  for (const uint32_t word : device_out.read()) printf("%08x\n", word);
  return 0;
}

template <Fault kFault>
int both_types() {
  const int bf16 = multiply_and_compare<Type::bf16, kFault>();
  return multiply_and_compare<Type::f16, kFault>() | bf16;
}

}  // namespace

int main(int argc, char** argv) {
  const auto is = [&](const char* what) { return argc > 1 && strcmp(argv[1], what) == 0; };
  try {
    if (is("patterns")) return print_patterns<Type::bf16>() | print_patterns<Type::f16>();
    if (is("no_wait")) return both_types<Fault::no_wait>();
    if (is("no_zeros")) return both_types<Fault::no_zeros>();
    return both_types<Fault::none>();
  } catch (const std::exception&) {
    return 1;  // printed where it arose
  }
}
