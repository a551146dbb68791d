// Memory that is zero between launches, for eager launches and for captured ones.
#include <algorithm>
#include <vector>

#include "cuda/zeros.h"
#include "intercept.h"
#include "problem.h"

namespace zeros_tests {

using namespace harness;
using braze::cuda::take_zeros;

namespace {

struct Range {
  unsigned int* begin;
  size_t words;
};

Range take(size_t words) {
  Range range = {nullptr, words};
  CHECK_OK(take_zeros(words, &range.begin));
  CHECK(reinterpret_cast<uintptr_t>(range.begin) % 128 == 0);
  return range;
}

bool zero(const Range& range) {
  std::vector<unsigned int> seen(range.words, 1);
  const size_t bytes = range.words * sizeof(unsigned int);
  CHECK_OK(cudaMemcpy(seen.data(), range.begin, bytes, cudaMemcpyDeviceToHost));
  return std::all_of(seen.begin(), seen.end(), [](unsigned int word) { return word == 0; });
}

}  // namespace

TEST(zeros_are_zero_and_nobody_elses) {
  const Deferred deferred;  // filled at once all the same: any stream may use them
  std::vector<Range> ranges;
  for (const size_t words : {1, 31, 32, 33, 4096, 1 << 18, 1 << 19, 1}) {
    ranges.push_back(take(words));
  }
  for (const Range& range : ranges) CHECK(zero(range));
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i) {
    CHECK(ranges[i - 1].begin + ranges[i - 1].words <= ranges[i].begin);
  }
}

// Of this thread in the strictest mode: neither the memory nor the fill is the graph's.
TEST(zeros_in_a_capture) {
  Stream stream;
  CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  std::vector<Range> ranges;
  for (int i = 0; i < 100; ++i) ranges.push_back(take(4096));
  cudaGraph_t graph = nullptr;
  CHECK_OK(cudaStreamEndCapture(stream, &graph));
  CHECK_OK(cudaGraphDestroy(graph));
  for (const Range& range : ranges) CHECK(zero(range));
}

// What is forbidden in a capture still is, after the zeros as before.
TEST(zeros_leave_captures_strict) {
  take(1 << 19);
  Stream stream;
  CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  take(1 << 19);
  void* memory = nullptr;
  CHECK_CODE(cudaMalloc(&memory, 16), cudaErrorStreamCaptureUnsupported);
  cudaGraph_t graph = nullptr;
  CHECK(cudaStreamEndCapture(stream, &graph) != cudaSuccess);
}

TEST(zeros_of_each_device) {
  const Range first = take(8);
  const OnDevice second(1);
  const Range other = take(8);
  CHECK(first.begin != other.begin && zero(other));
}

}  // namespace zeros_tests
