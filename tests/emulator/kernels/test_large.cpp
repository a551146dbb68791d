// Elements beyond 2^31 and 2^32: sparse memory, and only the chunks at the end run.
#include <sys/mman.h>

#include <cstring>

#include "problem.h"

namespace large_tests {

using namespace harness;
using namespace braze;
using cuda::StepLauncher;

namespace {

constexpr DType kAll[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

// Address space of which only the pages that are touched exist.
class Sparse {
 public:
  Sparse(int64_t elements, DType dtype, int64_t phase)
      : bytes_(static_cast<size_t>(elements + phase) * size_of(dtype)),
        front_(static_cast<size_t>(phase) * size_of(dtype)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory_ != MAP_FAILED);
  }
  ~Sparse() { munmap(memory_, bytes_); }
  Sparse(const Sparse&) = delete;
  char* data() const { return static_cast<char*>(memory_) + front_; }

 private:
  size_t bytes_, front_;
  void* memory_ = nullptr;
};

// p -= lr * g on the last `count` elements of the tensor alone, and on nothing before them.
void check_end(const TensorWork& work, const char* param, const char* grad, int64_t count,
               int64_t chunks, const std::vector<int64_t>& offsets) {
  const size_t size = size_of(work.param.dtype);
  const auto kept = static_cast<size_t>(count);
  std::vector<TensorWork> reference_work(1);
  Random random(seed());
  Buffer p(work.param.dtype, count, 0), g(work.param.dtype, count, 0);
  fill(p, random, false);
  fill(g, random, false);
  // memory(): the parameter's bytes, which are written through.
  for (size_t i = 0; i < kept; ++i) {
    const size_t to = static_cast<size_t>(offsets[i]) * size;
    memcpy(const_cast<char*>(param) + to, p.data() + i * size, size);
    memcpy(const_cast<char*>(grad) + to, g.data() + i * size, size);
  }
  StepLauncher launcher;
  launcher.limit_chunks(chunks - 2, chunks);
  const std::vector hypers = {hyper_of<Sgd>({}, 0)};
  const std::vector<TensorWork> list = {work};
  CHECK_OK(launch(launcher, {list, 1}, hypers, {}, nullptr));
  CHECK_OK(cudaDeviceSynchronize());
  TensorWork& expected = reference_work[0];
  expected.numel = count;
  expected.is_double = work.is_double;
  expected.param = {p.data(), nullptr, work.param.dtype};
  expected.grad = {g.data(), nullptr, work.param.dtype};
  expected.sum.dtype = work.param.dtype;
  Problem unused(kIndex<Sgd>, {}, {});
  unused.host = reference_work;
  reference(unused, hypers);
  // The chunks before the last two are not to run: the first element is in them.
  const int64_t first =
      std::max<int64_t>(0, count - (work.numel - (chunks - 2) * cuda::kChunkElements));
  for (size_t i = static_cast<size_t>(first); i < kept; ++i) {
    const char* got = param + static_cast<size_t>(offsets[i]) * size;
    if (memcmp(got, p.data() + i * size, size) == 0) continue;
    CHECK(!"the last elements differ from the reference");
    return;
  }
}

int64_t chunks_of(int64_t numel) {
  return (numel + cuda::kChunkElements - 1) / cuda::kChunkElements;
}

}  // namespace

TEST(large_linear) {
  for (const int64_t numel : {(int64_t{1} << 31) + 12345, (int64_t{1} << 32) + 5}) {
    for (const DType dtype : kAll) {
      for (const bool misaligned : {false, true}) {
        Case note("%lld elements of dtype %d, misaligned %d", static_cast<long long>(numel),
                  static_cast<int>(dtype), misaligned);
        const Sparse param(numel, dtype, misaligned), grad(numel, dtype, 0);
        TensorWork work;
        work.numel = numel;
        work.is_double = dtype == DType::f64;
        work.param = {param.data(), nullptr, dtype};
        work.grad = {grad.data(), nullptr, dtype};
        work.sum.dtype = dtype;
        constexpr int64_t kCount = 9000;
        std::vector<int64_t> offsets;
        for (int64_t i = numel - kCount; i < numel; ++i) offsets.push_back(i);
        check_end(work, param.data(), grad.data(), kCount, chunks_of(numel), offsets);
      }
    }
  }
}

// Few elements far apart: the offsets exceed 2^32, the indices do not.
TEST(large_strides) {
  for (const DType dtype : kAll) {
    Case note("dtype %d", static_cast<int>(dtype));
    const std::vector<int64_t> sizes = {100, 90}, strides = {(int64_t{1} << 26) + 7, 3};
    const int64_t numel = 9000, extent = 99 * strides[0] + 89 * strides[1] + 1;
    const Sparse param(extent, dtype, 1), grad(extent, dtype, 0);
    TensorWork work;
    work.numel = numel;
    work.ndim = 2;
    work.sizes = sizes.data();
    work.linear = false;
    work.is_double = dtype == DType::f64;
    work.param = {param.data(), strides.data(), dtype};
    work.grad = {grad.data(), strides.data(), dtype};
    work.sum.dtype = dtype;
    std::vector<int64_t> offsets;
    for (int64_t i = 0; i < numel; ++i)
      offsets.push_back(i / 90 * strides[0] + i % 90 * strides[1]);
    check_end(work, param.data(), grad.data(), numel, chunks_of(numel), offsets);
  }
}

// More elements than 2^31, and each index split along dimensions: both are large.
TEST(large_indices_and_strides) {
  const std::vector<int64_t> sizes = {(int64_t{1} << 16) + 3, (int64_t{1} << 15) + 5},
                             strides = {(int64_t{1} << 16) + 9, 2};
  const int64_t numel = sizes[0] * sizes[1];
  const int64_t extent = (sizes[0] - 1) * strides[0] + (sizes[1] - 1) * strides[1] + 1;
  const Sparse param(extent, DType::bf16, 0), grad(extent, DType::bf16, 0);
  TensorWork work;
  work.numel = numel;
  work.ndim = 2;
  work.sizes = sizes.data();
  work.linear = false;
  work.param = {param.data(), strides.data(), DType::bf16};
  work.grad = {grad.data(), strides.data(), DType::bf16};
  work.sum.dtype = DType::bf16;
  constexpr int64_t kCount = 9000;
  std::vector<int64_t> offsets;
  for (int64_t i = numel - kCount; i < numel; ++i) {
    offsets.push_back(i / sizes[1] * strides[0] + i % sizes[1] * strides[1]);
  }
  check_end(work, param.data(), grad.data(), kCount, chunks_of(numel), offsets);
}

}  // namespace large_tests
