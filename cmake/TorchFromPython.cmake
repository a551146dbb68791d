# Finds the torch of Python_EXECUTABLE without importing it and without torch's CMake package, which rewrites compiler
# flags, does not know libtorch_python and needs a working CUDA toolkit. Sets TORCH_ROOT, TORCH_VERSION and
# TORCH_CUDA_VERSION (empty for a CPU build), and defines the target torch::torch.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c [=[
import importlib.util, pathlib, runpy, sys
spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit(1)
root = pathlib.Path(spec.origin).parent
version = runpy.run_path(str(root / "version.py"))
print(root.as_posix(), version["__version__"], version.get("cuda") or "", sep=";", end="")
]=]
  OUTPUT_VARIABLE torch_facts
  RESULT_VARIABLE torch_missing)
if(torch_missing)
  message(FATAL_ERROR
    "torch was not found for ${Python_EXECUTABLE}.\n"
    "Install the torch you want to use braze with, then build without isolation:\n"
    "  pip install torch scikit-build-core ninja cmake\n"
    "  pip install --no-build-isolation .\n")
endif()
list(GET torch_facts 0 TORCH_ROOT)
list(GET torch_facts 1 TORCH_VERSION)
list(GET torch_facts 2 TORCH_CUDA_VERSION)
if(TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "braze needs torch 2.11 or newer; ${TORCH_ROOT} is ${TORCH_VERSION}.\n"
                      "  pip install --upgrade torch\n")
endif()

add_library(torch::torch INTERFACE IMPORTED)
target_include_directories(torch::torch SYSTEM INTERFACE
  "${TORCH_ROOT}/include" "${TORCH_ROOT}/include/torch/csrc/api/include")
target_link_directories(torch::torch INTERFACE "${TORCH_ROOT}/lib")
target_link_libraries(torch::torch INTERFACE c10 torch_cpu torch torch_python)
