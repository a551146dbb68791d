# Decides what becomes of the CUDA side and enables the language for it. Sets
#   BRAZE_CUDA_MODE     off, check (compile only: a CPU torch has nothing to link with) or module (build braze._cuda)
#   BRAZE_CUDA_MISSING  why braze._cuda is not built; empty when it is
#   BRAZE_NVCC_FLAGS    for .cu files, here and in `python -m braze build`
set(BRAZE_CUDA AUTO CACHE STRING
  "CUDA kernels. AUTO: iff the installed torch has CUDA. ON: with a CPU torch, check that they compile. OFF: none")
set_property(CACHE BRAZE_CUDA PROPERTY STRINGS AUTO ON OFF)
string(TOUPPER "${BRAZE_CUDA}" braze_cuda)
if(NOT braze_cuda MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "BRAZE_CUDA is '${BRAZE_CUDA}'; it must be AUTO, ON or OFF.")
endif()

set(BRAZE_CUDA_MISSING "")
if(braze_cuda STREQUAL OFF)
  set(BRAZE_CUDA_MODE off)
  set(BRAZE_CUDA_MISSING "braze was built with BRAZE_CUDA=OFF")
elseif(TORCH_CUDA_VERSION)
  set(BRAZE_CUDA_MODE module)
else()
  if(braze_cuda STREQUAL ON)
    set(BRAZE_CUDA_MODE check)
  else()
    set(BRAZE_CUDA_MODE off)
  endif()
  set(BRAZE_CUDA_MISSING "braze was built against torch ${TORCH_VERSION}, which has no CUDA")
endif()

# -fmad=false: only explicit fma, as in the CPU kernels, so that both compute the same bits.
set(BRAZE_NVCC_FLAGS -fmad=false --compress-mode=size -Xcompiler=-ffp-contract=off,-Wall,-Wextra)
# Register spills are errors too, but only in checks: nvcc stores ptxas options beside the PTX, where a user's driver
# would meet them when it compiles for a GPU that is not listed.
set(werror_nvcc_flags -Werror=all-warnings -Xcompiler=-Werror -Xptxas=-warn-spills,-Werror)
set(BRAZE_CUDA_ARCHITECTURES "")
set(BRAZE_CUDA_VERSION "")
if(BRAZE_CUDA_MODE STREQUAL off)
  message(STATUS "CUDA kernels: no, ${BRAZE_CUDA_MISSING}")
  return()
endif()

# One search for CMake and for `python -m braze build`.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -I "${CMAKE_CURRENT_SOURCE_DIR}/python/braze/_nvcc.py" "${TORCH_CUDA_VERSION}"
  OUTPUT_VARIABLE toolkit
  RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR
    "braze's CUDA kernels cannot be compiled: ${toolkit}\n"
    "To build the CPU kernels only, opt out:\n"
    "  pip install --no-build-isolation -C cmake.define.BRAZE_CUDA=OFF .\n")
endif()
list(POP_FRONT toolkit nvcc toolkit_root toolkit_release cudart)
set(BRAZE_CUDA_VERSION "${toolkit_release}")
if(TORCH_CUDA_VERSION AND NOT TORCH_CUDA_VERSION VERSION_EQUAL toolkit_release)
  message(STATUS "CUDA toolkit ${toolkit_release} and torch's CUDA ${TORCH_CUDA_VERSION} differ in their minor: that works")
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "${toolkit}")
endif()
set(BRAZE_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
message(STATUS "CUDA kernels: ${BRAZE_CUDA_MODE}, ${nvcc}, ${BRAZE_CUDA_ARCHITECTURES}")

set(CMAKE_CUDA_COMPILER "${nvcc}")
if(NOT EXISTS "${toolkit_root}/lib64")
  set(ENV{LIBRARY_PATH} "${toolkit_root}/lib:$ENV{LIBRARY_PATH}") # pip's nvcc searches lib64, pip has lib
endif()
enable_language(CUDA)

# The one c10/cuda header that CPU builds of torch leave out.
set(cuda_includes "${toolkit_root}/include")
if(NOT EXISTS "${TORCH_ROOT}/include/c10/cuda/impl/cuda_cmake_macros.h")
  file(CONFIGURE OUTPUT torch_cuda_stub/c10/cuda/impl/cuda_cmake_macros.h
    CONTENT "#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
  list(APPEND cuda_includes "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub")
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/ops/*_cuda.cpp)
# Objects on their own: all that can be had with a CPU torch, and what tests/support/cuda_gates.py measures.
add_library(braze_cuda_objects OBJECT ${cuda_sources})
target_compile_features(braze_cuda_objects PRIVATE cxx_std_20 cuda_std_20)
set_target_properties(braze_cuda_objects PROPERTIES
  POSITION_INDEPENDENT_CODE ON
  CXX_EXTENSIONS OFF CUDA_EXTENSIONS OFF
  CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
  CUDA_RUNTIME_LIBRARY None)
target_compile_options(braze_cuda_objects PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:${BRAZE_CXX_FLAGS}>
  $<$<COMPILE_LANGUAGE:CUDA>:${BRAZE_NVCC_FLAGS}>
  $<$<AND:$<BOOL:${BRAZE_WERROR}>,$<COMPILE_LANGUAGE:CXX>>:-Werror>
  $<$<AND:$<BOOL:${BRAZE_WERROR}>,$<COMPILE_LANGUAGE:CUDA>>:${werror_nvcc_flags}>)
target_include_directories(braze_cuda_objects SYSTEM PRIVATE ${cuda_includes} ${Python_INCLUDE_DIRS})
target_link_libraries(braze_cuda_objects PRIVATE torch::torch)

if(BRAZE_CUDA_MODE STREQUAL module)
  # torch's own CUDA runtime where pip brought one: the process must not have two.
  string(REGEX MATCH "^[0-9]+" major "${TORCH_CUDA_VERSION}")
  file(GLOB torchs_cudart "${TORCH_ROOT}/../nvidia/cu${major}/lib/libcudart.so.*"
    "${TORCH_ROOT}/../nvidia/cuda_runtime/lib/libcudart.so.*" "${TORCH_ROOT}/lib/libcudart*.so*")
  list(APPEND torchs_cudart ${cudart})
  if(NOT torchs_cudart)
    message(FATAL_ERROR "libcudart.so, the CUDA runtime, is neither beside torch nor in ${toolkit_root}.\n"
      "Install it:\n  pip install 'nvidia-cuda-runtime==${TORCH_CUDA_VERSION}.*'\n")
  endif()
  list(GET torchs_cudart 0 cudart)
  Python_add_library(_cuda MODULE WITH_SOABI $<TARGET_OBJECTS:braze_cuda_objects>)
  set_target_properties(_cuda PROPERTIES
    LINKER_LANGUAGE CXX
    CUDA_RUNTIME_LIBRARY None
    INSTALL_RPATH "$ORIGIN/../torch/lib;$ORIGIN/../nvidia/cu${major}/lib;$ORIGIN/../nvidia/cuda_runtime/lib")
  target_link_libraries(_cuda PRIVATE torch::torch c10_cuda torch_cuda "${cudart}")
  install(TARGETS _cuda DESTINATION braze COMPONENT cuda)
else() # nothing that could be loaded
  set(BRAZE_CUDA_VERSION "")
  set(BRAZE_CUDA_ARCHITECTURES "")
endif()
