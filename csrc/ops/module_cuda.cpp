// The Python module braze._cuda: nothing but the backend, for braze._C.register_backend.
#include "../cuda/runtime.h"
#include "backend_cuda.h"

namespace braze {
namespace {

class RealCudaBackend final : public CudaBackend {
 public:
  const char* name() const override { return "cuda"; }
  int device_of(const at::Tensor& tensor) const override {
    return tensor.is_cuda() ? tensor.get_device() : -1;
  }
  bool holds_scalar(const at::Tensor& tensor, bool) const override { return tensor.is_cuda(); }
};

}  // namespace
}  // namespace braze

PyMODINIT_FUNC PyInit__cuda() {
  const std::string mismatch = braze::interface_mismatch("libbraze_cuda", braze::cuda::interface());
  if (!mismatch.empty()) {
    PyErr_SetString(PyExc_ImportError, mismatch.c_str());
    return nullptr;
  }
  static braze::RealCudaBackend backend;
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_cuda",
                                   "braze's CUDA kernels",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return braze::make_backend_module(definition, backend);
}
