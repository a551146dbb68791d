#include "harness.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <exception>

namespace harness {
namespace {

struct Test {
  const char* name;
  void (*function)();
};

struct State {
  std::vector<Test> tests;
  std::vector<const Case*> cases;
  bool small = false, stop = false;
  int failures = 0;
  const char* running = "";
};

State& state() {
  static State instance;
  return instance;
}

constexpr int kMaxReported = 10;

// In order, against it, and seeded ones.
std::vector<emulator::Schedule> all_schedules() {
  using emulator::Order;
  std::vector<emulator::Schedule> schedules = {{Order::inorder, seed(), 0},
                                               {Order::reverse, seed(), 0}};
  for (uint64_t i = 0; i < 3; ++i) schedules.push_back({Order::random, seed() + i, 0.01});
  for (uint64_t i = 0; i < 5; ++i) schedules.push_back({Order::pct, seed() + i, 0.01});
  return schedules;
}

void run(const Test& test) {
  state().running = test.name;
  try {
    test.function();
  } catch (const std::exception& error) {
    failed(test.name, 0, std::string("threw: ") + error.what());
  }
  emulator::set_deferred(false);
  (void)cudaSetDevice(0);
  (void)cudaGetLastError();
}

void print_barriers() {
  for (const emulator::BarrierSite& site : emulator::barrier_sites()) {
    printf("barrier %s:%d %s\n", site.file.c_str(), site.line, site.kind.c_str());
  }
}

}  // namespace

Registered::Registered(const char* name, void (*function)()) {
  state().tests.push_back({name, function});
}

bool small() { return state().small; }

uint64_t seed() {
  static const uint64_t value = [] {
    const char* text = getenv("BRAZE_EMULATOR_SEED");
    return text == nullptr ? 1u : strtoull(text, nullptr, 10);
  }();
  return value;
}

void failed(const char* file, int line, const std::string& what) {
  if (++state().failures <= kMaxReported) {
    const char* slash = strrchr(file, '/');
    printf("FAILED %s: %s:%d: %s", state().running, slash ? slash + 1 : file, line, what.c_str());
    for (const Case* the_case : state().cases) printf(" [%s]", the_case->text);
    printf(" [%s]\n", emulator::describe(emulator::schedule()).c_str());
  }
  if (state().stop) {
    fflush(stdout);
    _Exit(1);
  }
}

Case::Case(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  state().cases.push_back(this);
}
Case::~Case() { state().cases.pop_back(); }

Sparse::Sparse(size_t bytes) : bytes_(bytes) {
  memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(memory_ != MAP_FAILED);
}
Sparse::~Sparse() { munmap(memory_, bytes_); }

}  // namespace harness

using namespace harness;

// [--small] [--stop] [--all-schedules] [--barriers] [test ...]: all tests if none is named, except
// those whose name begins with "seeded": they must fail.
int main(int argc, char** argv) {
  bool every_schedule = false, barriers = false;
  std::vector<Test> chosen;
  for (int i = 1; i < argc; ++i) {
    const auto is = [&](const char* text) { return strcmp(argv[i], text) == 0; };
    if (is("--small")) {
      state().small = true;
    } else if (is("--stop")) {
      state().stop = true;
    } else if (is("--all-schedules")) {
      every_schedule = true;
    } else if (is("--barriers")) {
      barriers = true;
    } else {
      const size_t before = chosen.size();
      for (const Test& test : state().tests) {
        if (is(test.name)) chosen.push_back(test);
      }
      if (chosen.size() == before) {
        printf("there is no test \"%s\"; there are:", argv[i]);
        for (const Test& test : state().tests) printf(" %s", test.name);
        printf("\n");
        return 2;
      }
    }
  }
  if (chosen.empty()) {
    for (const Test& test : state().tests) {
      if (strncmp(test.name, "seeded", 6) != 0) {
        chosen.push_back(test);
      }
    }
  }
  std::vector<emulator::Schedule> schedules = {emulator::schedule()};
  if (every_schedule) schedules = all_schedules();
  for (const emulator::Schedule& schedule : schedules) {
    emulator::set_schedule(schedule);
    for (const Test& test : chosen) run(test);
    // The full lists once; other orders differ in who runs when, not in what runs.
    state().small = true;
  }
  if (barriers) print_barriers();
  printf("%zu tests, %zu schedules, seed %llu: %d failures\n", chosen.size(), schedules.size(),
         static_cast<unsigned long long>(seed()), state().failures);
  return state().failures == 0 ? 0 : 1;
}
