// Streams, events and captured graphs: work, and what it waits for.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "internal.h"

namespace emulator {

struct Work {
  int device = 0;
  std::vector<std::shared_ptr<Work>> after;
  std::function<void()> run;  // null: only an order
  bool done = false;
};
using WorkPointer = std::shared_ptr<Work>;

struct Node {
  std::vector<int> after;  // nodes
  std::function<void()> run;
  int kernel_device = -1;  // of a kernel
};

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  cudaStream_t origin;
  std::vector<Node> nodes;
  bool invalid = false;
};
using CapturePointer = std::shared_ptr<Capture>;

// One lock for everything: a launch has the emulator to itself.
std::recursive_mutex& api_mutex();

// Remembers a failure for cudaGetLastError.
cudaError_t result(cudaError_t error);
int current_device();

// Null for a handle that is none.
CUstream_st* find_stream(cudaStream_t handle);
// Queues, captures or runs it. `kernel_device`: where it counts as a launch, or -1.
cudaError_t submit(CUstream_st* stream, std::function<void()> run, int kernel_device = -1);
void run_until(const WorkPointer& work);
void run_everything();
// For calls that a capture forbids: the capture is invalid from now on.
bool forbidden_in_capture();

// Its streams capture no longer.
void leave_capture(const CapturePointer& capture);

void count_launch(int device);

enum class MemoryKind { unknown, device, pinned };
MemoryKind memory_kind(const void* address);

}  // namespace emulator

struct CUstream_st {
  int device = 0;
  bool legacy = false;        // the null stream
  bool non_blocking = false;  // does not wait for the null stream
  emulator::WorkPointer tail;
  emulator::CapturePointer capture;
  std::vector<int> capture_tail;
};

struct CUevent_st {
  int device = 0;
  emulator::WorkPointer work;
  emulator::CapturePointer capture;
  std::vector<int> nodes;
};

struct CUgraph_st {
  std::vector<emulator::Node> nodes;
};

struct CUgraphExec_st {
  std::shared_ptr<const std::vector<emulator::Node>> nodes;
};
