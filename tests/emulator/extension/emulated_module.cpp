// The Python module _emulated: csrc/cuda and its host layer for CPU tensors, on the emulator. The
// same backend interface as braze._cuda, and what a test needs to steer it. Once the fake device is
// installed, for its tensors instead.
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <Python.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <cuda_runtime.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <map>
#include <string>

#include "emulated_memory.h"
#include "emulator/control.h"
#include "fake_device.h"
#include "ops/backend_cuda.h"
#include "ops/launch_cuda.h"

namespace c10::cuda {
namespace {
std::array<cudaStream_t, 64> current_streams = {};
}

CUDAStream getCurrentCUDAStream(DeviceIndex device) {
  int index = device;
  if (device < 0) cudaGetDevice(&index);
  return CUDAStream(current_streams[static_cast<size_t>(index)]);
}

void set_current_stream(DeviceIndex device, cudaStream_t stream) {
  current_streams[static_cast<size_t>(device)] = stream;
}

}  // namespace c10::cuda

c10::Allocator* c10::cuda::CUDACachingAllocator::get() {
  return c10::GetAllocator(fake_device::installed() ? c10::kCUDA : c10::kCPU);
}

namespace {

// What captured launches read: one seed for all graphs, one offset per launch within a graph.
int64_t replay_seed = 0, replay_offset = 0;
uint64_t captured_draws = 0;

}  // namespace

at::PhiloxCudaState at::CUDAGeneratorImpl::philox_cuda_state(uint64_t increment) {
  PhiloxCudaState state;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream().stream(), &status);
  state.captured_ = status != cudaStreamCaptureStatusNone;
  if (state.captured_) {
    state.seed_.ptr = &replay_seed;
    state.offset_.ptr = &replay_offset;
    state.offset_intragraph_ = captured_draws++ * increment;
  } else {
    state.seed_.val = source_->random64();
  }
  return state;
}

namespace {

void before_replay() {
  if (captured_draws == 0) return;
  auto* source = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      std::nullopt, at::cuda::detail::getDefaultCUDAGenerator(0));
  const std::lock_guard<std::mutex> lock(source->mutex_);
  replay_seed = static_cast<int64_t>(source->random64());
}

// Memory ranges that tests put on another emulated device than 0.
std::map<uintptr_t, std::pair<uintptr_t, int>>& ranges() {
  static std::map<uintptr_t, std::pair<uintptr_t, int>> map;  // begin -> (end, device)
  return map;
}
bool enabled = false;

class EmulatedBackend final : public braze::CudaBackend {
 public:
  const char* name() const override { return fake_device::installed() ? "cuda" : "emulated"; }
  int device_of(const at::Tensor& tensor) const override {
    if (fake_device::installed()) return tensor.is_cuda() ? tensor.get_device() : -1;
    if (!enabled || !tensor.is_cpu()) return -1;
    if (ranges().empty()) return 0;
    const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    auto after = ranges().upper_bound(address);
    if (after == ranges().begin()) return 0;
    const auto& [end, device] = std::prev(after)->second;
    return address < end ? device : 0;
  }
  bool holds_scalar(const at::Tensor& tensor, bool wanted) const override {
    if (fake_device::installed()) return tensor.is_cuda();
    return enabled && wanted && tensor.is_cpu();
  }
};

PyObject* raise(cudaError_t error) {
  cudaGetLastError();  // else the next launch reports it
  PyErr_SetString(PyExc_RuntimeError, cudaGetErrorString(error));
  return nullptr;
}

// Work that was queued runs inside these calls: a rule it broke surfaces here.
#define TRY(call)                                                                      \
  do {                                                                                 \
    try {                                                                              \
      if (const cudaError_t error = (call); error != cudaSuccess) return raise(error); \
    } catch (const std::exception& error) {                                            \
      PyErr_SetString(PyExc_RuntimeError, error.what());                               \
      return nullptr;                                                                  \
    }                                                                                  \
  } while (false)

PyObject* none() { Py_RETURN_NONE; }

PyObject* enable(PyObject*, PyObject* value) {
  enabled = PyObject_IsTrue(value) == 1;
  return none();
}

PyObject* install_fake_device(PyObject*, PyObject*) {
  TRY((fake_device::install(), cudaSuccess));
  return none();
}

PyObject* default_generator(PyObject*, PyObject* device) {
  return THPGenerator_Wrap(fake_device::default_generator(static_cast<int>(PyLong_AsLong(device))));
}

PyObject* resize_storage(PyObject*, PyObject* args) {
  PyObject* tensor;
  unsigned long long bytes;
  if (!PyArg_ParseTuple(args, "OK", &tensor, &bytes)) return nullptr;
  TRY((fake_device::resize_storage(THPVariable_Unpack(tensor).storage(), bytes), cudaSuccess));
  return none();
}

PyObject* exchange_device(PyObject*, PyObject* device) {
  int before = 0;
  TRY(cudaGetDevice(&before));
  const int wanted = static_cast<int>(PyLong_AsLong(device));
  if (wanted >= 0) TRY(cudaSetDevice(wanted));
  return PyLong_FromLong(before);
}

PyObject* place(PyObject*, PyObject* args) {
  unsigned long long begin, bytes;
  int device;
  if (!PyArg_ParseTuple(args, "KKi", &begin, &bytes, &device)) return nullptr;
  ranges()[begin] = {begin + bytes, device};
  return none();
}

PyObject* clear_places(PyObject*, PyObject*) {
  ranges().clear();
  return none();
}

PyObject* set_schedule(PyObject*, PyObject* args) {
  const char* order;
  unsigned long long seed;
  if (!PyArg_ParseTuple(args, "sK", &order, &seed)) return nullptr;
  const std::string name = order;
  emulator::Schedule schedule;
  schedule.seed = seed;
  schedule.order = name == "reverse"  ? emulator::Order::reverse
                   : name == "random" ? emulator::Order::random
                   : name == "pct"    ? emulator::Order::pct
                                      : emulator::Order::inorder;
  emulator::set_schedule(schedule);
  return none();
}

PyObject* set_null_launch(PyObject*, PyObject* value) {
  emulator::set_null_launch(PyObject_IsTrue(value) == 1);
  return none();
}

PyObject* set_deferred(PyObject*, PyObject* value) {
  const bool deferred = PyObject_IsTrue(value) == 1;
  TRY((emulator::set_deferred(deferred), cudaSuccess));
  emulated_memory::set_deferred(deferred);
  return none();
}

PyObject* pending_work(PyObject*, PyObject*) { return PyLong_FromSize_t(emulator::pending_work()); }

PyObject* set_print_errors(PyObject*, PyObject* value) {
  emulator::set_print_errors(PyObject_IsTrue(value) == 1);
  return none();
}

PyObject* set_device_count(PyObject*, PyObject* count) {
  emulator::set_device_count(static_cast<int>(PyLong_AsLong(count)));
  return none();
}

PyObject* schedule(PyObject*, PyObject*) {
  return PyUnicode_FromString(emulator::describe(emulator::schedule()).c_str());
}

PyObject* synchronize(PyObject*, PyObject*) {
  int count = 0;
  TRY(cudaGetDeviceCount(&count));
  for (int device = 0; device < count; ++device) {
    const braze::OnDevice guard(static_cast<c10::DeviceIndex>(device));
    TRY(cudaDeviceSynchronize());
  }
  emulated_memory::work_has_run();
  return none();
}

PyObject* launch_count(PyObject*, PyObject* device) {
  return PyLong_FromLongLong(emulator::launch_count(static_cast<int>(PyLong_AsLong(device))));
}

PyObject* new_stream(PyObject*, PyObject* device) {
  const braze::OnDevice guard(static_cast<c10::DeviceIndex>(PyLong_AsLong(device)));
  cudaStream_t stream;
  TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return PyLong_FromVoidPtr(stream);
}

PyObject* destroy_stream(PyObject*, PyObject* stream) {
  TRY(cudaStreamDestroy(static_cast<cudaStream_t>(PyLong_AsVoidPtr(stream))));
  return none();
}

PyObject* current_stream(PyObject*, PyObject* device) {
  const auto index = static_cast<c10::DeviceIndex>(PyLong_AsLong(device));
  return PyLong_FromVoidPtr(c10::cuda::getCurrentCUDAStream(index).stream());
}

PyObject* use_stream(PyObject*, PyObject* args) {
  int device;
  unsigned long long stream;
  if (!PyArg_ParseTuple(args, "iK", &device, &stream)) return nullptr;
  c10::cuda::set_current_stream(static_cast<c10::DeviceIndex>(device),
                                reinterpret_cast<cudaStream_t>(stream));
  return none();
}

// On the current stream of device 0.
PyObject* begin_capture(PyObject*, PyObject*) {
  TRY(cudaStreamBeginCapture(c10::cuda::getCurrentCUDAStream(0).stream(),
                             cudaStreamCaptureModeGlobal));
  emulated_memory::begin_capture();
  return none();
}

PyObject* end_capture(PyObject*, PyObject*) {
  emulated_memory::end_capture();
  cudaGraph_t graph = nullptr;
  TRY(cudaStreamEndCapture(c10::cuda::getCurrentCUDAStream(0).stream(), &graph));
  cudaGraphExec_t executable = nullptr;
  TRY(cudaGraphInstantiate(&executable, graph, 0));
  TRY(cudaGraphDestroy(graph));
  return PyLong_FromVoidPtr(executable);
}

PyObject* replay(PyObject*, PyObject* graph) {
  auto* executable = static_cast<cudaGraphExec_t>(PyLong_AsVoidPtr(graph));
  before_replay();
  TRY(cudaGraphLaunch(executable, c10::cuda::getCurrentCUDAStream(0).stream()));
  return none();
}

PyObject* destroy_graph(PyObject*, PyObject* graph) {
  TRY(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(PyLong_AsVoidPtr(graph))));
  emulated_memory::graph_destroyed();
  return none();
}

PyMethodDef methods[] = {
    {"enable", enable, METH_O,
     "CPU tensors belong to the emulated device from now on, or no more."},
    {"install_fake_device", install_fake_device, METH_NOARGS,
     "CUDA tensors belong to the emulated device, and no others, until the process ends."},
    {"default_generator", default_generator, METH_O, "The generator of a fake device."},
    {"resize_storage", resize_storage, METH_VARARGS, "Of a tensor of a fake device: bytes."},
    {"exchange_device", exchange_device, METH_O,
     "Makes a device the current one unless it is -1; returns the one before."},
    {"place", place, METH_VARARGS, "Puts memory [begin, begin + bytes) on a device."},
    {"clear_places", clear_places, METH_NOARGS, "All memory is device 0's again."},
    {"set_schedule", set_schedule, METH_VARARGS, "order, seed"},
    {"set_null_launch", set_null_launch, METH_O, "Kernels do not run."},
    {"set_deferred", set_deferred, METH_O, "Work runs only when something waits for it."},
    {"pending_work", pending_work, METH_NOARGS, "How much is queued."},
    {"set_print_errors", set_print_errors, METH_O, "Broken rules are also printed (default)."},
    {"set_device_count", set_device_count, METH_O, "Default: 2."},
    {"schedule", schedule, METH_NOARGS, "The schedule, as environment variables."},
    {"synchronize", synchronize, METH_NOARGS, "Runs what is queued on any device."},
    {"launch_count", launch_count, METH_O, "Launches on a device so far."},
    {"new_stream", new_stream, METH_O, "A stream of a device."},
    {"destroy_stream", destroy_stream, METH_O, "Gives a stream back."},
    {"current_stream", current_stream, METH_O, "The current stream of a device; 0: the default."},
    {"use_stream", use_stream, METH_VARARGS,
     "Makes a stream the current one of a device; 0: the default."},
    {"begin_capture", begin_capture, METH_NOARGS, "Captures the current stream of device 0."},
    {"end_capture", end_capture, METH_NOARGS, "Ends the capture; returns the graph."},
    {"replay", replay, METH_O, "Launches a graph."},
    {"destroy_graph", destroy_graph, METH_O, "Gives a graph back."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit__emulated() {
  static EmulatedBackend backend;
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_emulated", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return braze::make_backend_module(definition, backend);
}
