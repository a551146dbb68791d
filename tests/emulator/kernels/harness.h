// Tests as functions, checks that say where and in which case, and the command line.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "emulator/control.h"

namespace harness {

struct Registered {
  Registered(const char* name, void (*function)());
};

// Sanitized builds are up to 60 times slower: they get the small lists.
bool small();
uint64_t seed();

// Fails the test; the process goes on with the next check unless --stop was given.
void failed(const char* file, int line, const std::string& what);
inline bool check(bool condition, const char* text, const char* file, int line) {
  if (!condition) failed(file, line, std::string("expected ") + text);
  return condition;
}
inline bool check_code(cudaError_t code, cudaError_t wanted, const char* text, const char* file,
                       int line) {
  if (code != wanted) {
    failed(file, line,
           std::string(text) + " gave " + cudaGetErrorName(code) + " instead of " +
               cudaGetErrorName(wanted));
  }
  return code == wanted;
}

// Names the case in failures while it lives. No std::string: MSan does not see what the C++ library
// writes.
class Case {
 public:
  explicit Case(const char* format, ...) __attribute__((format(printf, 2, 3)));
  ~Case();
  Case(const Case&) = delete;
  char text[200];
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15u) {}
  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du) >> 32);
  }
  uint32_t below(uint32_t n) { return next() % n; }
  double uniform() { return next() / 4294967296.0; }

 private:
  uint64_t state_;
};

// Work is queued while it lives.
struct Deferred {
  Deferred() { emulator::set_deferred(true); }
  ~Deferred() { emulator::set_deferred(false); }
};

struct Stream {
  cudaStream_t handle = nullptr;
  Stream() { (void)cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking); }
  ~Stream() {
    (void)cudaStreamSynchronize(handle);
    (void)cudaStreamDestroy(handle);
  }
  Stream(const Stream&) = delete;
  operator cudaStream_t() const { return handle; }
};

// Address space, of zeros, of which only the pages that are touched exist.
class Sparse {
 public:
  explicit Sparse(size_t bytes);
  ~Sparse();
  Sparse(const Sparse&) = delete;
  uint16_t* data() const { return static_cast<uint16_t*>(memory_); }

 private:
  size_t bytes_;
  void* memory_ = nullptr;
};

struct OnDevice {
  explicit OnDevice(int device) { (void)cudaSetDevice(device); }
  ~OnDevice() { (void)cudaSetDevice(0); }
};

}  // namespace harness

#define TEST(name)                                                        \
  static void test_##name();                                              \
  static const harness::Registered registered_##name(#name, test_##name); \
  static void test_##name()
#define CHECK(condition) harness::check(condition, #condition, __FILE__, __LINE__)
#define CHECK_OK(call) harness::check_code(call, cudaSuccess, #call, __FILE__, __LINE__)
#define CHECK_CODE(call, wanted) harness::check_code(call, wanted, #call, __FILE__, __LINE__)
