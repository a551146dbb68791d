// Capturing streams into graphs, and replaying them.
#include <algorithm>

#include "stream.h"

namespace emulator {
namespace {

// Nodes that `tail` comes after, itself included.
std::vector<bool> ancestors(const std::vector<Node>& nodes, std::vector<int> tail) {
  std::vector<bool> seen(nodes.size());
  while (!tail.empty()) {
    const auto node = static_cast<size_t>(tail.back());
    tail.pop_back();
    if (seen[node]) continue;
    seen[node] = true;
    for (const int before : nodes[node].after) tail.push_back(before);
  }
  return seen;
}

// In an order that the graph allows, drawn by the schedule.
void run_nodes(const std::vector<Node>& nodes, Random& random) {
  std::vector<bool> done(nodes.size());
  for (size_t count = 0; count < nodes.size(); ++count) {
    std::vector<size_t> ready;
    for (size_t i = 0; i < nodes.size(); ++i) {
      const bool open = std::all_of(nodes[i].after.begin(), nodes[i].after.end(),
                                    [&](int before) { return done[static_cast<size_t>(before)]; });
      if (!done[i] && open) ready.push_back(i);
    }
    size_t pick = ready.front();
    const Order order = settings().schedule.order;
    if (order == Order::reverse) pick = ready.back();
    if (order >= Order::random) pick = ready[random.below(static_cast<uint32_t>(ready.size()))];
    done[pick] = true;
    if (nodes[pick].run) nodes[pick].run();
  }
}

}  // namespace
}  // namespace emulator

using namespace emulator;

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream->legacy) return result(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return result(cudaErrorIllegalState);
  stream->capture = std::make_shared<Capture>();
  static unsigned long long captures = 0;
  stream->capture->id = ++captures;
  stream->capture->mode = mode;
  stream->capture->thread = std::this_thread::get_id();
  stream->capture->origin = stream;
  stream->capture_tail.clear();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr || graph == nullptr) return result(cudaErrorInvalidResourceHandle);
  give(graph, nullptr);
  const CapturePointer capture = stream->capture;
  if (!capture || capture->origin != stream) return result(cudaErrorStreamCaptureUnmatched);
  if (capture->mode != cudaStreamCaptureModeRelaxed &&
      capture->thread != std::this_thread::get_id()) {
    capture->invalid = true;
    return result(cudaErrorStreamCaptureWrongThread);
  }
  const std::vector<bool> joined = ancestors(capture->nodes, stream->capture_tail);
  leave_capture(capture);
  if (capture->invalid) return result(cudaErrorStreamCaptureInvalidated);
  if (std::find(joined.begin(), joined.end(), false) != joined.end()) {
    return result(cudaErrorStreamCaptureUnjoined);
  }
  give(graph, new CUgraph_st{std::move(capture->nodes)});
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  std::lock_guard lock(api_mutex());
  if (exec == nullptr || graph == nullptr) return result(cudaErrorInvalidValue);
  give(exec, new CUgraphExec_st{std::make_shared<const std::vector<Node>>(graph->nodes)});
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (exec == nullptr || stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (!stream->capture) {
    for (const Node& node : *exec->nodes) {
      if (node.kernel_device >= 0) count_launch(node.kernel_device);
    }
  }
  static uint64_t replays = 0;
  const uint64_t seed = settings().schedule.seed + ++replays;
  return result(submit(stream, [nodes = exec->nodes, seed] {
    Random random;
    random.seed(seed);
    run_nodes(*nodes, random);
  }));
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (graph == nullptr) return result(cudaErrorInvalidValue);
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  if (exec == nullptr) return result(cudaErrorInvalidValue);
  delete exec;
  return cudaSuccess;
}
