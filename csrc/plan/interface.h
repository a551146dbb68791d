// What the libraries of kernels show to the bindings, and which one of its kind it is.
#pragma once
#include <string>

// Everything else in libbraze_kernels and libbraze_cuda is hidden.
#define BRAZE_API __attribute__((visibility("default")))

// By the build: a digest of the headers that both sides are compiled with.
#ifndef BRAZE_INTERFACE
#define BRAZE_INTERFACE "none"
#endif

namespace braze {

constexpr const char* kInterface = BRAZE_INTERFACE;

// That of libbraze_kernels.
BRAZE_API const char* kernels_interface();

// "" if a library's interface is the caller's own, else what is wrong.
inline std::string interface_mismatch(const char* library, const char* interface) {
  if (std::string(interface) == kInterface) return {};
  return std::string("braze's files are of different builds: ") + library + " has the interface " +
         interface + ", what uses it wants " + kInterface;
}

}  // namespace braze
