# Decides what becomes of the CUDA side, enables the language for it and defines libbraze_cuda. Sets
#   BRAZE_CUDA_MODE     off, or on
#   BRAZE_CUDA_MISSING  why there is no libbraze_cuda; empty if there is
#   BRAZE_NVCC_FLAGS    for .cu files, here and in `python -m braze build`
#   BRAZE_TOOLKIT       the folder of the CUDA toolkit
set(BRAZE_CUDA AUTO CACHE STRING
  "CUDA kernels. AUTO: iff one of the torches has CUDA. ON: for CPU torches too, which cannot use them. OFF: none")
set_property(CACHE BRAZE_CUDA PROPERTY STRINGS AUTO ON OFF)
string(TOUPPER "${BRAZE_CUDA}" braze_cuda)
if(NOT braze_cuda MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "BRAZE_CUDA is '${BRAZE_CUDA}'; it must be AUTO, ON or OFF.")
endif()

set(BRAZE_CUDA_MISSING "")
if(braze_cuda STREQUAL OFF)
  set(BRAZE_CUDA_MODE off)
  set(BRAZE_CUDA_MISSING "braze was built with BRAZE_CUDA=OFF")
elseif(TORCH_CUDA_VERSION OR braze_cuda STREQUAL ON)
  set(BRAZE_CUDA_MODE on)
else()
  set(BRAZE_CUDA_MODE off)
  list(GET BRAZE_MINORS 0 minor)
  get_target_property(version torch${minor} BRAZE_VERSION)
  set(BRAZE_CUDA_MISSING "braze was built against torch ${version}, which has no CUDA")
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
list(POP_FRONT toolkit nvcc BRAZE_TOOLKIT toolkit_release cudart)
set(BRAZE_CUDA_VERSION "${toolkit_release}")
if(TORCH_CUDA_VERSION AND NOT TORCH_CUDA_VERSION VERSION_EQUAL toolkit_release)
  message(STATUS "CUDA toolkit ${toolkit_release} and torch's CUDA ${TORCH_CUDA_VERSION} differ in their minor: that works")
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "${toolkit}")
endif()
set(BRAZE_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
message(STATUS "CUDA kernels: ${nvcc}, ${BRAZE_CUDA_ARCHITECTURES}")

set(CMAKE_CUDA_COMPILER "${nvcc}")
if(NOT EXISTS "${BRAZE_TOOLKIT}/lib64")
  set(ENV{LIBRARY_PATH} "${BRAZE_TOOLKIT}/lib:$ENV{LIBRARY_PATH}") # pip's nvcc searches lib64, pip has lib
endif()
enable_language(CUDA)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
# With a CUDA runtime of its own, whose names stay inside: torch's may be of another release.
add_library(braze_cuda SHARED ${cuda_sources})
target_compile_features(braze_cuda PRIVATE cuda_std_20)
target_compile_options(braze_cuda PRIVATE
  "$<$<COMPILE_LANGUAGE:CUDA>:${BRAZE_NVCC_FLAGS};-Xcompiler=${prefix_map};$<$<BOOL:${BRAZE_WERROR}>:${werror_nvcc_flags}>>")
target_include_directories(braze_cuda SYSTEM PRIVATE "${BRAZE_TOOLKIT}/include")
target_link_libraries(braze_cuda PRIVATE "${cudart}" rt dl pthread)
target_link_options(braze_cuda PRIVATE ${exports})
braze_options(braze_cuda)
set_target_properties(braze_cuda PROPERTIES PREFIX lib LINKER_LANGUAGE CXX
  CUDA_EXTENSIONS OFF CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY None)
install(TARGETS braze_cuda DESTINATION braze)
