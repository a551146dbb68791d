// What the emulator's own files share.
#pragma once
#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda_runtime.h"
#include "emulator/control.h"

namespace emulator {

// Prints and throws Error, with what is needed to replay it.
[[noreturn]] void fail(const std::string& what);
std::string text(Site site);
std::string text(uint3 index);

// xorshift64*: one multiply a draw.
class Random {
 public:
  void seed(uint64_t seed) { state_ = (seed + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u | 1; }
  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du) >> 32);
  }
  uint32_t below(uint32_t n) {
    return static_cast<uint32_t>((static_cast<uint64_t>(next()) * n) >> 32);
  }

 private:
  uint64_t state_ = 0x9e3779b97f4a7c15u;
};

struct Settings {
  Schedule schedule;
  bool abort_on_error = false;
  bool print_errors = true;
  bool concurrent_blocks = false;
  bool null_launch = false;
  bool deferred = false;
  int device_count = 2;
  int blocks_per_processor = 4;
  int cooperative_blocks = 132 * 2;
  uint64_t block_begin = 0;
  uint64_t block_end = UINT64_MAX;
};
Settings& settings();

// A barrier was reached: true if it is to be deleted.
bool barrier_reached(Site site, const char* kind);

// Runs the kernel, on the calling OS thread.
void run_launch(const LaunchConfig& config, const KernelCall& call, uint64_t launch_number);
// The launch now running, or null.
std::string running_launch();

void mark_written(const void* address, size_t bytes);
// Writes what a caller gets through a pointer: the emulator's own writes are invisible to MSan.
template <class T>
void give(T* out, std::type_identity_t<T> value) {
  *out = value;
  mark_written(out, sizeof(T));
}

constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kDefaultSharedBytes = 48 * 1024;
void fill_poison(void* address, size_t bytes);

void reset_devices();
void reset_streams();

}  // namespace emulator
