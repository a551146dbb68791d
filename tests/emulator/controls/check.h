// CHECK(condition): says where and counts; finish() is main's result.
#pragma once
#include <cstdio>
#include <functional>
#include <string>

#include "emulator/control.h"

inline int failures = 0;
inline int checks = 0;

#define CHECK(condition)                                                            \
  do {                                                                              \
    ++checks;                                                                       \
    if (!(condition)) {                                                             \
      ++failures;                                                                   \
      fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
    }                                                                               \
  } while (false)

inline int finish() {
  printf("%d checks, %d failed\n", checks, failures);
  return failures ? 1 : 0;
}

// The error's text, "" if there was none.
inline std::string error_of(const std::function<void()>& call) {
  emulator::set_print_errors(false);
  std::string text;
  try {
    call();
  } catch (const emulator::Error& error) {
    text = error.what();
  }
  emulator::set_print_errors(true);
  return text;
}

inline bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}
