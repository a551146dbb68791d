#include "stream.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

namespace emulator {
namespace {

struct Streams {
  std::vector<std::unique_ptr<CUstream_st>> null;  // by device
  std::unordered_set<CUstream_st*> live;
  std::unordered_set<CUevent_st*> events;
  std::vector<WorkPointer> pending;
  Random random;
};

Streams& streams() {
  static Streams* const instance = new Streams;
  return *instance;
}

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

CUstream_st* null_stream(int device) {
  auto& null = streams().null;
  while (static_cast<int>(null.size()) <= device) {
    auto stream = std::make_unique<CUstream_st>();
    stream->device = static_cast<int>(null.size());
    stream->legacy = true;
    null.push_back(std::move(stream));
  }
  return null[static_cast<size_t>(device)].get();
}

void add(std::vector<WorkPointer>& list, const WorkPointer& work) {
  if (work && !work->done) list.push_back(work);
}

// The null stream waits for all blocking streams of its device, and they for it.
std::vector<WorkPointer> predecessors(CUstream_st* stream) {
  std::vector<WorkPointer> list;
  add(list, stream->tail);
  if (stream->legacy) {
    for (CUstream_st* other : streams().live) {
      if (other->device == stream->device && !other->non_blocking) add(list, other->tail);
    }
  } else if (!stream->non_blocking) {
    add(list, null_stream(stream->device)->tail);
  }
  return list;
}

bool ready(const Work& work) {
  return std::all_of(work.after.begin(), work.after.end(), [](const auto& w) { return w->done; });
}

void run_now(const WorkPointer& work) {
  work->done = true;
  work->after.clear();
  if (work->run) work->run();
  work->run = nullptr;
}

void collect(const WorkPointer& work, std::unordered_set<Work*>& needed) {
  if (work->done || !needed.insert(work.get()).second) return;
  for (const WorkPointer& before : work->after) collect(before, needed);
}

// Work that is ready, of `needed` if given, drawn by the schedule's seed.
WorkPointer take(const std::unordered_set<Work*>* needed) {
  auto& pending = streams().pending;
  std::vector<size_t> candidates;
  for (size_t i = 0; i < pending.size(); ++i) {
    if ((needed == nullptr || needed->count(pending[i].get())) && ready(*pending[i])) {
      candidates.push_back(i);
    }
  }
  if (candidates.empty()) return nullptr;
  size_t at = 0;
  const Order order = settings().schedule.order;
  if (order == Order::reverse) at = candidates.size() - 1;
  if (order >= Order::random) {
    at = streams().random.below(static_cast<uint32_t>(candidates.size()));
  }
  WorkPointer work = pending[candidates[at]];
  pending.erase(pending.begin() + static_cast<std::ptrdiff_t>(candidates[at]));
  return work;
}

}  // namespace

std::recursive_mutex& api_mutex() {
  static std::recursive_mutex* const instance = new std::recursive_mutex;
  return *instance;
}

CUstream_st* find_stream(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return null_stream(current_device());
  return streams().live.count(handle) ? handle : nullptr;
}

void run_until(const WorkPointer& work) {
  if (!work || work->done) return;
  std::unordered_set<Work*> needed;
  collect(work, needed);
  while (!work->done) {
    // Other work may run as well, or not.
    const bool any = settings().schedule.order >= Order::random && streams().random.below(2) == 0;
    run_now(take(any ? nullptr : &needed));
  }
}

void run_everything() {
  while (const WorkPointer work = take(nullptr)) run_now(work);
}

size_t pending_work() {
  std::lock_guard lock(api_mutex());
  return streams().pending.size();
}

cudaError_t submit(CUstream_st* stream, std::function<void()> run, int kernel_device) {
  if (stream->capture) {
    Capture& capture = *stream->capture;
    if (capture.invalid) return cudaErrorStreamCaptureInvalidated;
    capture.nodes.push_back({stream->capture_tail, std::move(run), kernel_device});
    stream->capture_tail = {static_cast<int>(capture.nodes.size()) - 1};
    return cudaSuccess;
  }
  if (stream->legacy) {
    for (CUstream_st* other : streams().live) {
      if (other->capture && !other->non_blocking && other->device == stream->device) {
        other->capture->invalid = true;
        return cudaErrorStreamCaptureImplicit;
      }
    }
  }
  if (kernel_device >= 0) count_launch(kernel_device);
  if (!settings().deferred) {
    if (run) run();
    return cudaSuccess;
  }
  auto work = std::make_shared<Work>();
  work->device = stream->device;
  work->after = predecessors(stream);
  work->run = std::move(run);
  stream->tail = work;
  streams().pending.push_back(work);
  return cudaSuccess;
}

bool forbidden_in_capture() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  bool forbidden = false;
  for (CUstream_st* stream : streams().live) {
    if (!stream->capture || stream->capture->mode == cudaStreamCaptureModeRelaxed) continue;
    const bool mine = stream->capture->thread == std::this_thread::get_id();
    const bool local = thread_mode == cudaStreamCaptureModeThreadLocal ||
                       stream->capture->mode == cudaStreamCaptureModeThreadLocal;
    if (!mine && local) continue;
    stream->capture->invalid = true;
    forbidden = true;
  }
  return forbidden;
}

void reset_streams() {
  Streams& all = streams();
  all.pending.clear();
  for (CUstream_st* stream : all.live) {
    stream->tail = nullptr;
    stream->capture = nullptr;
  }
  all.null.clear();
  all.random.seed(settings().schedule.seed);
}

cudaError_t host_function(cudaStream_t handle, void (*function)(void*), void* data) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  return result(submit(stream, [=] { function(data); }));
}

void leave_capture(const CapturePointer& capture) {
  for (CUstream_st* stream : streams().live) {
    if (stream->capture == capture) stream->capture = nullptr;
  }
}

CUevent_st* find_event(cudaEvent_t handle) {
  return streams().events.count(handle) ? handle : nullptr;
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  std::lock_guard lock(api_mutex());
  if (stream == nullptr || flags > cudaStreamNonBlocking) return result(cudaErrorInvalidValue);
  auto* made = new CUstream_st;
  made->device = current_device();
  made->non_blocking = flags == cudaStreamNonBlocking;
  streams().live.insert(made);
  give(stream, made);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr || stream->legacy) return result(cudaErrorInvalidResourceHandle);
  if (stream->capture) stream->capture->invalid = true;
  streams().live.erase(stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream->capture) {
    stream->capture->invalid = true;
    return result(cudaErrorStreamCaptureUnsupported);
  }
  if (forbidden_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  if (!stream->legacy) {
    run_until(stream->tail);
  } else {
    for (const WorkPointer& work : predecessors(stream)) run_until(work);
  }
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (forbidden_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  if (!stream->tail || stream->tail->done) return cudaSuccess;
  // So that a loop of queries ends.
  run_now(take(nullptr));
  return result(cudaErrorNotReady);
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int* device) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr || device == nullptr) return result(cudaErrorInvalidResourceHandle);
  give(device, stream->device);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  if (mode == nullptr) return result(cudaErrorInvalidValue);
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(handle, status);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  const bool invalid = stream->capture && stream->capture->invalid;
  give(status, invalid           ? cudaStreamCaptureStatusInvalidated
               : stream->capture ? cudaStreamCaptureStatusActive
                                 : cudaStreamCaptureStatusNone);
  if (id != nullptr && stream->capture) give(id, stream->capture->id);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  std::lock_guard lock(api_mutex());
  if (forbidden_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  const int device = current_device();
  for (;;) {
    const auto& pending = streams().pending;
    const auto at = std::find_if(pending.begin(), pending.end(),
                                 [=](const WorkPointer& work) { return work->device == device; });
    if (at == pending.end()) return cudaSuccess;
    run_until(WorkPointer(*at));
  }
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  std::lock_guard lock(api_mutex());
  if (event == nullptr) return result(cudaErrorInvalidValue);
  auto* made = new CUevent_st;
  made->device = current_device();
  streams().events.insert(made);
  give(event, made);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::lock_guard lock(api_mutex());
  if (find_event(event) == nullptr) return result(cudaErrorInvalidResourceHandle);
  streams().events.erase(event);
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (find_event(event) == nullptr || stream == nullptr || event->device != stream->device) {
    return result(cudaErrorInvalidResourceHandle);
  }
  if (stream->capture) {
    if (stream->capture->invalid) return result(cudaErrorStreamCaptureInvalidated);
    event->capture = stream->capture;
    event->nodes = stream->capture_tail;
    return cudaSuccess;
  }
  if (const cudaError_t error = submit(stream, nullptr)) return result(error);
  event->capture = nullptr;
  event->work = stream->tail;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  std::lock_guard lock(api_mutex());
  CUstream_st* stream = find_stream(handle);
  if (find_event(event) == nullptr || stream == nullptr) {
    return result(cudaErrorInvalidResourceHandle);
  }
  if (event->capture) {
    if (stream->capture && stream->capture != event->capture) {
      stream->capture->invalid = event->capture->invalid = true;
      return result(cudaErrorStreamCaptureIsolation);
    }
    if (stream->legacy) {
      event->capture->invalid = true;
      return result(cudaErrorStreamCaptureImplicit);
    }
    if (!stream->capture) {
      stream->capture = event->capture;
      stream->capture_tail.clear();
    }
    for (const int node : event->nodes) stream->capture_tail.push_back(node);
    return cudaSuccess;
  }
  if (stream->capture) {
    stream->capture->invalid = true;
    return result(cudaErrorStreamCaptureIsolation);
  }
  if (!event->work || event->work->done) return cudaSuccess;
  if (const cudaError_t error = submit(stream, nullptr)) return result(error);
  if (stream->tail && !stream->tail->done) stream->tail->after.push_back(event->work);
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  std::lock_guard lock(api_mutex());
  if (find_event(event) == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (event->capture) {
    event->capture->invalid = true;
    return result(cudaErrorCapturedEvent);
  }
  if (forbidden_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  if (!event->work || event->work->done) return cudaSuccess;
  run_now(take(nullptr));
  return result(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::lock_guard lock(api_mutex());
  if (find_event(event) == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (event->capture) {
    event->capture->invalid = true;
    return result(cudaErrorCapturedEvent);
  }
  if (forbidden_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  run_until(event->work);
  return cudaSuccess;
}
