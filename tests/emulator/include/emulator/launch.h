// Launching a kernel.
#pragma once
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime_api.h"
#include "threads.h"

namespace emulator {

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  bool cooperative;
  const char* kernel_name;
  Site site;
};

// A call of a kernel with its types forgotten; its arguments may be copied as bytes.
struct KernelCall {
  void (*invoke)(void (*function)(), const void* arguments);
  void (*function)();
  const void* arguments;
  size_t bytes, alignment;
};

cudaError_t launch_kernel(const LaunchConfig& config, const KernelCall& call);

constexpr size_t kMaxParameterBytes = 32764;

template <class... P>
constexpr size_t parameter_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  return bytes;
}

template <class... P, class... A>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(P...), A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "a launch passes every parameter of its kernel");
  static_assert((std::is_trivially_copyable_v<std::remove_cvref_t<P>> && ...),
                "kernel parameters are copied as bytes");
  static_assert(parameter_bytes<std::remove_cvref_t<P>...>() <= kMaxParameterBytes,
                "CUDA limits a launch's parameters to 32,764 bytes");
  using Values = std::tuple<std::remove_cvref_t<P>...>;
  // One copy per launch; a BRAZE_GRID_CONSTANT parameter is a reference to it in every thread.
  const Values values(std::forward<A>(arguments)...);
  KernelCall call;
  call.invoke = [](void (*function)(), const void* bytes) {
    std::apply(reinterpret_cast<void (*)(P...)>(function), *static_cast<const Values*>(bytes));
  };
  call.function = reinterpret_cast<void (*)()>(kernel);
  call.arguments = &values;
  call.bytes = sizeof(Values);
  call.alignment = alignof(Values);
  return launch_kernel(config, call);
}

}  // namespace emulator

#define EMULATOR_LAUNCH(kernel, grid, block, shared_bytes, stream, cooperative, ...) \
  ::emulator::launch(::emulator::LaunchConfig{grid,                                  \
                                              block,                                 \
                                              static_cast<size_t>(shared_bytes),     \
                                              stream,                                \
                                              cooperative,                           \
                                              #kernel,                               \
                                              {__FILE__, __LINE__}},                 \
                     kernel __VA_OPT__(, ) __VA_ARGS__)

#define BRAZE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  EMULATOR_LAUNCH(kernel, grid, block, shared_bytes, stream, false __VA_OPT__(, ) __VA_ARGS__)
#define BRAZE_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  EMULATOR_LAUNCH(kernel, grid, block, shared_bytes, stream, true __VA_OPT__(, ) __VA_ARGS__)

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return emulator::set_function_attribute(reinterpret_cast<void (*)()>(kernel), attribute, value);
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...),
                                                          int block_threads, size_t shared_bytes) {
  return emulator::occupancy(blocks, reinterpret_cast<void (*)()>(kernel), block_threads,
                             shared_bytes);
}
