// The table in device memory while work is in flight, when its content changes, and when calls
// fail.
#include <cstring>
#include <memory>

#include "cuda/device_table.h"
#include "intercept.h"
#include "problem.h"

namespace table_tests {

using namespace harness;
using namespace braze;
using cuda::DeviceTable;
using cuda::StepLauncher;

namespace {

// What a reader of the table finds, in page-locked memory so that the copy stays in flight.
class Snapshot {
 public:
  explicit Snapshot(size_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    CHECK_OK(cudaMallocHost(&memory, bytes));
    memory_ = static_cast<char*>(memory);
  }
  ~Snapshot() { (void)cudaFreeHost(memory_); }
  Snapshot(const Snapshot&) = delete;
  void take(const DeviceTable& table, cudaStream_t stream) {
    CHECK_OK(cudaMemcpyAsync(memory_, table.device(), bytes_, cudaMemcpyDeviceToHost, stream));
  }
  bool equals(const std::vector<char>& content) const {
    return memcmp(memory_, content.data(), bytes_) == 0;
  }

 private:
  char* memory_;
  size_t bytes_;
};

void set_image(DeviceTable& table, const std::vector<char>& content) {
  memcpy(table.image(content.size()), content.data(), content.size());
}

std::vector<char> content_of(size_t bytes, int k) {
  std::vector<char> content(bytes);
  for (size_t i = 0; i < bytes; ++i) content[i] = static_cast<char>(i * 7 + static_cast<size_t>(k));
  return content;
}

bool uploaded(DeviceTable& table, const std::vector<char>& content) {
  Snapshot snapshot(content.size());
  snapshot.take(table, nullptr);
  CHECK_OK(cudaDeviceSynchronize());
  return snapshot.equals(content);
}

// Enough tensors that the entries do not fit the argument; `count` 2100: nothing does.
std::vector<Spec> many(int count, int64_t numel = 3) {
  std::vector<Spec> specs(static_cast<size_t>(count));
  for (Spec& spec : specs) spec.sizes = {numel};
  return specs;
}

}  // namespace

// More uploads in flight than there are staging buffers: none may be overwritten before its copy.
TEST(uploads_in_flight) {
  constexpr size_t kBytes = 600;
  const int count = small() ? 20 : 300;
  Stream stream;
  DeviceTable table;
  Deferred deferred;
  intercept::hold_events(true);
  const int allocated = intercept::host_allocations();
  std::vector<std::unique_ptr<Snapshot>> snapshots;
  for (int k = 0; k < count; ++k) {
    snapshots.push_back(std::make_unique<Snapshot>(kBytes));
    set_image(table, content_of(kBytes, k));
    CHECK_OK(table.upload(stream));
    snapshots.back()->take(table, stream);
    CHECK_OK(table.mark_read(stream));
  }
  const int staging = intercept::host_allocations() - allocated - count;
  CHECK(staging == std::min(count, 256));
  intercept::hold_events(false);
  CHECK_OK(cudaStreamSynchronize(stream));
  for (int k = 0; k < count; ++k) {
    if (!CHECK(snapshots[static_cast<size_t>(k)]->equals(content_of(kBytes, k)))) break;
  }
}

// Buffers whose copies are through are used again.
TEST(staging_reuse) {
  Stream stream;
  DeviceTable table;
  const int allocated = intercept::host_allocations();
  for (int k = 0; k < 50; ++k) {
    set_image(table, content_of(600, k));
    CHECK_OK(table.upload(stream));
    CHECK_OK(cudaStreamSynchronize(stream));
  }
  CHECK(intercept::host_allocations() - allocated == 1);
}

TEST(changed_blocks) {
  DeviceTable table;
  std::vector<char> content = content_of(10000, 0);
  const auto check = [&](size_t bytes) {
    set_image(table, content);
    CHECK_OK(table.upload(nullptr));
    CHECK(table.bytes_uploaded() == bytes);
    CHECK(uploaded(table, content));
  };
  check(10000);
  check(0);
  ++content[5000];
  check(256);
  ++content[255], ++content[256];
  check(512);
  ++content[9999];
  check(10000 - 9984);
  ++content[0], ++content[9999];
  check(10000);
  content.resize(300);  // shorter, and as before
  check(0);
  content = content_of(9000, 3);
  check(9000);
  content.resize(20000, 'x');  // longer, in the same memory
  check(20000 - 8960);
  content.resize(100000, 'y');  // more memory: everything again
  check(100000);
  ++content[70000];
  check(256);
}

// Another stream's upload waits for the last reader; the same stream's need not.
TEST(change_of_stream) {
  for (uint64_t k = 0; k < 8; ++k) {
    emulator::Schedule schedule = emulator::schedule();
    schedule.seed += k;
    emulator::set_schedule(schedule);
    Stream a, b;
    DeviceTable table;
    Deferred deferred;
    Snapshot first(600), second(600), third(600);
    set_image(table, content_of(600, 1));
    CHECK_OK(table.upload(a));
    first.take(table, a);
    CHECK_OK(table.mark_read(a));
    const int waits = intercept::event_waits();
    set_image(table, content_of(600, 2));
    CHECK_OK(table.upload(b));
    CHECK(intercept::event_waits() == waits + 1);
    second.take(table, b);
    CHECK_OK(table.mark_read(b));
    set_image(table, content_of(600, 2));  // the same content, but a reads before b's copy lands
    CHECK_OK(table.upload(a));
    third.take(table, a);
    CHECK_OK(table.mark_read(a));
    CHECK_OK(cudaStreamSynchronize(k % 2 ? a : b));
    CHECK_OK(cudaStreamSynchronize(k % 2 ? b : a));
    CHECK(first.equals(content_of(600, 1)));
    CHECK(second.equals(content_of(600, 2)));
    CHECK(third.equals(content_of(600, 2)));
  }
}

// Whole steps in flight on two streams in turn, with gradients that change every step, so that the
// table does.
TEST(steps_in_flight) {
  OnDevice one(1);
  const int steps = small() ? 4 : 24;
  for (const int count : {500, 2100}) {
    if (small() && count > 500) continue;
    Problem problem(kIndex<Adam>, many(count), {3});
    Stream streams[2];
    StepLauncher launcher;
    std::vector<std::vector<float>> grads;
    {
      Deferred deferred;
      for (int k = 0; k < steps; ++k) {
        grads.emplace_back(static_cast<size_t>(count) * 3, 0.5f + static_cast<float>(k));
        for (size_t i = 0; i < problem.device.size(); ++i) {
          problem.device[i].grad.data = problem.host[i].grad.data = &grads.back()[3 * i];
        }
        // Now and then another list, so that the entries change too.
        const int64_t generation = k / 8;
        const std::vector hypers = {hyper_of<Adam>({}, 0, k + 1)};
        CHECK_OK(launch(launcher, {problem.device, generation}, hypers, {}, streams[k / 3 % 2]));
        // The parameters themselves need an order between the streams that the caller makes.
        if (k % 3 == 2) {
          cudaEvent_t event;
          CHECK_OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
          CHECK_OK(cudaEventRecord(event, streams[k / 3 % 2]));
          CHECK_OK(cudaStreamWaitEvent(streams[1 - k / 3 % 2], event, 0));
          CHECK_OK(cudaEventDestroy(event));
        }
        reference(problem, hypers);
      }
      CHECK_OK(cudaDeviceSynchronize());
    }
    problem.check(__FILE__, __LINE__);
  }
}

// Each call fails once, in the first step or a later one: nothing was launched then, or there was
// no error, and the steps after it are right.
TEST(failing_calls) {
  OnDevice one(1);
  const std::vector<int> all = {500, 2100}, few = {500};
  for (const int count : small() ? few : all) {
    for (const int failing_step : {1, 2}) {
      if (count > 500 && failing_step == 1) continue;
      for (int k = 0, done = 0; !done; ++k) {
        std::vector<Spec> specs = many(count);
        for (size_t i = 0; i < specs.size(); i += 10) specs[i].step = 2;
        Problem problem(kIndex<Adam>, specs, {3});
        const std::vector<DeviceHyper<Adam>> hypers(1, [] {
          DeviceHyper<Adam> h = {};
          h.options = options_of<Adam>({}, 0);
          h.inputs.step = 3;
          return h;
        }());
        const std::vector host_hypers = {make_hyper<Adam>(hypers[0].options, {.step = 3})};
        StepLauncher launcher;
        Stream stream;
        for (int step = 1; step <= 3; ++step) {
          // Entries and flags change, so that every step uploads.
          for (TensorWork& work : problem.device) work.first = step % 2 != 0;
          for (size_t i = 0; i < specs.size(); i += 10) {
            *static_cast<float*>(problem.device[i].step.data) = 2;
          }
          if (step == failing_step) intercept::fail_call(k);
          const cudaError_t error = launch(launcher, {problem.device, step}, hypers, {}, stream);
          const bool failed = step == failing_step && intercept::failure_happened();
          intercept::fail_call(-1);
          Case note("%s failed, k %d, in step %d, now %d",
                    failed ? intercept::failed_call() : "none", k, failing_step, step);
          CHECK_OK(cudaStreamSynchronize(stream));
          (void)cudaGetLastError();
          if (step == failing_step && !failed) done = 1;
          if (failed && error != cudaSuccess) {
            CHECK(problem.untouched());
            CHECK(problem.step_of(0) == 2);
            continue;
          }
          if (!failed) CHECK_OK(error);
          reference(problem, host_hypers);
          problem.check(__FILE__, __LINE__);
          CHECK(problem.step_of(0) == 3);
        }
      }
    }
  }
}

namespace {
// The same of the table alone, with its copies in flight: a reader sees what upload() promised.
void fail_each_upload(bool event_record) {
  constexpr size_t kBytes = 600;
  for (int k = 0, done = 0; !done; ++k) {
    Stream stream;
    DeviceTable table;
    Deferred deferred;
    std::vector<std::unique_ptr<Snapshot>> snapshots;
    std::vector<int> contents;
    for (int step = 0; step < 5; ++step) {
      const int content = step / 2 * 2;  // every second one is as the one before
      snapshots.push_back(std::make_unique<Snapshot>(kBytes));
      set_image(table, content_of(kBytes, content));
      if (step == 2) intercept::fail_call(k);
      const cudaError_t error = table.upload(stream);
      if (step == 2) done = !intercept::failure_happened();
      intercept::fail_call(-1);
      contents.push_back(error == cudaSuccess ? content : -1);
      if (error != cudaSuccess) continue;
      snapshots.back()->take(table, stream);
      CHECK_OK(table.mark_read(stream));
    }
    CHECK_OK(cudaStreamSynchronize(stream));
    Case note("%s failed", done ? "no call" : intercept::failed_call());
    const bool record = !done && strcmp(intercept::failed_call(), "cudaEventRecord") == 0;
    if (record && !event_record) continue;
    for (size_t i = 0; i < snapshots.size(); ++i) {
      if (contents[i] >= 0) CHECK(snapshots[i]->equals(content_of(kBytes, contents[i])));
    }
  }
  (void)cudaGetLastError();
}
}  // namespace
TEST(failing_uploads) { fail_each_upload(false); }
TEST(unrecorded_staging) { fail_each_upload(true); }

namespace {
// A copy that failed is made again by the next upload, whatever the content.
void repeat_failed_copy(int filler, bool same_again) {
  DeviceTable table;
  const std::vector<char> before = content_of(600, 1);
  set_image(table, before);
  CHECK_OK(table.upload(nullptr));
  const std::vector<char> content(600, static_cast<char>(filler));
  for (int k = 0;; ++k) {
    set_image(table, content);
    intercept::fail_call(k);
    const cudaError_t error = table.upload(nullptr);
    const bool failed = intercept::failure_happened();
    intercept::fail_call(-1);
    if (!CHECK(failed && error != cudaSuccess)) return;
    if (strcmp(intercept::failed_call(), "cudaMemcpyAsync") == 0) break;
  }
  // The copy left rubbish behind: neither the new content is there nor the old.
  const std::vector<char>& wanted = same_again ? content : before;
  set_image(table, wanted);
  CHECK_OK(table.upload(nullptr));
  CHECK(uploaded(table, wanted));
  (void)cudaGetLastError();
}
}  // namespace
TEST(failed_copy_is_repeated) {
  for (const int filler : {0x5a, 0x00, 0xff, 0xee}) {
    for (const bool same_again : {false, true}) repeat_failed_copy(filler, same_again);
  }
}

// A launch fails after its upload; the next step is on another stream, and must see that upload.
TEST(other_stream_after_failure) {
  for (uint64_t k = 0; k < 8; ++k) {
    emulator::Schedule schedule = emulator::schedule();
    schedule.seed += k;
    emulator::set_schedule(schedule);
    Stream a, b;
    DeviceTable table;
    Deferred deferred;
    Snapshot snapshot(600);
    set_image(table, content_of(600, 1));
    CHECK_OK(table.upload(a));  // and no mark_read
    set_image(table, content_of(600, 1));
    CHECK_OK(table.upload(b));
    snapshot.take(table, b);
    CHECK_OK(cudaStreamSynchronize(b));
    CHECK(snapshot.equals(content_of(600, 1)));
    CHECK_OK(cudaStreamSynchronize(a));
  }
}

}  // namespace table_tests
