// Memory that is zero between launches: for eager launches, and for captured ones, which may not
// allocate.
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

Range take(size_t words, bool capturing) {
  Range range = {nullptr, words};
  CHECK_OK(take_zeros(words, capturing, &range.begin));
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
    ranges.push_back(take(words, false));
  }
  for (const Range& range : ranges) CHECK(zero(range));
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i) {
    CHECK(ranges[i - 1].begin + ranges[i - 1].words <= ranges[i].begin);
  }
}

TEST(zeros_in_a_capture) {
  take(1, false);  // leaves enough for what follows
  Stream stream;
  CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  std::vector<Range> ranges;
  for (int i = 0; i < 30; ++i) ranges.push_back(take(4096, true));
  unsigned int* none = nullptr;
  CHECK_CODE(take_zeros(1 << 20, true, &none), cudaErrorStreamCaptureUnsupported);
  CHECK(none == nullptr);
  cudaGraph_t graph = nullptr;
  CHECK_OK(cudaStreamEndCapture(stream, &graph));  // nothing of it has invalidated the capture
  CHECK_OK(cudaGraphDestroy(graph));
  for (const Range& range : ranges) CHECK(zero(range));
}

TEST(zeros_of_each_device) {
  const Range first = take(8, false);
  const OnDevice second(1);
  const Range other = take(8, false);
  CHECK(first.begin != other.begin && zero(other));
}

}  // namespace zeros_tests
