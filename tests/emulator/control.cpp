// Settings, errors, and the list of barrier sites.
#include "emulator/control.h"

#include <cstdlib>
#include <mutex>

#include "fiber.h"
#include "internal.h"
#include "stream.h"

namespace emulator {
namespace {

std::string environment(const char* name) {
  const char* value = getenv(name);
  return value ? value : "";
}

const char* const kOrders[] = {"inorder", "reverse", "random", "pct"};

Schedule environment_schedule() {
  Schedule result;
  if (const std::string order = environment("BRAZE_EMULATOR_ORDER"); !order.empty()) {
    int found = -1;
    for (int i = 0; i < 4; ++i) {
      if (order == kOrders[i]) found = i;
    }
    if (found < 0) {
      fprintf(stderr,
              "emulator: BRAZE_EMULATOR_ORDER is \"%s\"; it may be inorder, reverse, random or "
              "pct\n",
              order.c_str());
      exit(2);
    }
    result.order = static_cast<Order>(found);
  }
  if (const std::string seed = environment("BRAZE_EMULATOR_SEED"); !seed.empty()) {
    result.seed = strtoull(seed.c_str(), nullptr, 10);
  }
  if (const std::string yield = environment("BRAZE_EMULATOR_YIELD"); !yield.empty()) {
    result.preemption = strtod(yield.c_str(), nullptr);
  }
  return result;
}

Settings environment_settings() {
  Settings result;
  result.schedule = environment_schedule();
  result.abort_on_error = environment("BRAZE_EMULATOR_ABORT") == "1";
  result.concurrent_blocks = environment("BRAZE_EMULATOR_TSAN_MODE") == "B";
  return result;
}

struct Sites {
  std::vector<BarrierSite> all;
  std::string dropped = environment("BRAZE_EMULATOR_DROP_BARRIER");
  int64_t dropped_arrivals = 0;
  struct Entry {
    const char* file = nullptr;
    int line = 0;
    bool drop = false;
  };
  Entry cache[256];
};

Sites& sites() {
  static Sites* const instance = new Sites;
  return *instance;
}

bool is_dropped(size_t index, const BarrierSite& site) {
  const std::string& wanted = sites().dropped;
  if (wanted.empty()) return false;
  if (wanted.find(':') == std::string::npos) return wanted == std::to_string(index);
  const std::string here = site.file + ":" + std::to_string(site.line);
  if (here.size() < wanted.size() || !here.ends_with(wanted)) return false;
  return here.size() == wanted.size() || here[here.size() - wanted.size() - 1] == '/';
}

Sites::Entry look_up(Site site, const char* kind) {
  Unobserved unobserved;
  std::vector<BarrierSite>& all = sites().all;
  size_t index = 0;
  while (index < all.size() && (all[index].line != site.line || all[index].file != site.file)) {
    ++index;
  }
  if (index == all.size()) all.push_back({site.file, site.line, kind});
  return {site.file, site.line, is_dropped(index, all[index])};
}

}  // namespace

Settings& settings() {
  static Settings* const instance = new Settings(environment_settings());
  return *instance;
}

bool barrier_reached(Site site, const char* kind) {
  const auto hash = reinterpret_cast<uintptr_t>(site.file) / 8 + static_cast<unsigned>(site.line);
  Sites::Entry& entry = sites().cache[hash % 256];
  if (entry.file != site.file || entry.line != site.line) entry = look_up(site, kind);
  sites().dropped_arrivals += entry.drop;
  return entry.drop;
}

std::vector<BarrierSite> barrier_sites() { return sites().all; }
int64_t dropped_arrivals() { return sites().dropped_arrivals; }

void drop_barrier(const std::string& site) {
  sites().dropped = site;
  sites().dropped_arrivals = 0;
  for (Sites::Entry& entry : sites().cache) entry = {};
}

Schedule schedule() { return settings().schedule; }
void set_schedule(const Schedule& schedule) { settings().schedule = schedule; }

std::string describe(const Schedule& schedule) {
  std::string result = std::string("BRAZE_EMULATOR_ORDER=") +
                       kOrders[static_cast<int>(schedule.order)] +
                       " BRAZE_EMULATOR_SEED=" + std::to_string(schedule.seed);
  if (schedule.preemption > 0) {
    result += " BRAZE_EMULATOR_YIELD=" + std::to_string(schedule.preemption);
  }
  return result;
}

void set_abort_on_error(bool abort) { settings().abort_on_error = abort; }
void set_print_errors(bool print) { settings().print_errors = print; }
void set_block_range(uint64_t begin, uint64_t end) {
  settings().block_begin = begin;
  settings().block_end = end;
}
void clear_block_range() { set_block_range(0, UINT64_MAX); }
void set_concurrent_blocks(bool concurrent) { settings().concurrent_blocks = concurrent; }
void set_stack_bytes(size_t bytes) { set_fiber_stack_bytes(bytes); }
void set_device_count(int count) { settings().device_count = count; }
void set_blocks_per_processor(int n) { settings().blocks_per_processor = n; }
void set_cooperative_blocks(int n) { settings().cooperative_blocks = n; }
void set_null_launch(bool null) { settings().null_launch = null; }
void set_deferred(bool deferred) {
  std::lock_guard lock(api_mutex());
  if (!deferred) run_everything();
  settings().deferred = deferred;
}

void reset() {
  std::lock_guard lock(api_mutex());
  settings() = environment_settings();
  sites().all.clear();
  drop_barrier(environment("BRAZE_EMULATOR_DROP_BARRIER"));
  reset_streams();
  reset_devices();
}

std::string text(Site site) {
  const std::string file = site.file;
  const size_t slash = file.rfind('/');
  return (slash == std::string::npos ? file : file.substr(slash + 1)) + ":" +
         std::to_string(site.line);
}

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

void fail(const std::string& what) {
  Unobserved unobserved;
  std::string message = "emulator: " + what + ".";
  if (const std::string launch = running_launch(); !launch.empty())
    message += " In " + launch + ".";
  message += " Replay with " + describe(settings().schedule);
  mark_written(message.data(), message.size() + 1);
  if (settings().print_errors) {
    fprintf(stderr, "%s\n", message.c_str());
    fflush(stderr);
  }
  if (settings().abort_on_error) abort();
  throw Error(message);
}

void trap(Site site) { fail("__trap() reached at " + text(site)); }

}  // namespace emulator
