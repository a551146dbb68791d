# What knows torch, once for each minor of torch and, where it knows Python too, for each CPython:
#   _C.torch2.13.cpython-311-x86_64-linux-gnu.so     and, for a torch with CUDA,     _cuda.torch2.13.cpython-311-...so
# `import braze` picks those of its torch and its interpreter.
set(BRAZE_PYTHONS "" CACHE STRING "Interpreters to build bindings for. Default: the one that builds")
set(BRAZE_LEFT_OUT "" CACHE STRING "Pairs without a binding, as 2.15.cpython-310-x86_64-linux-gnu")
set(pythons ${BRAZE_PYTHONS})
if(NOT pythons)
  set(pythons "${Python_EXECUTABLE}")
endif()

file(GLOB ops CONFIGURE_DEPENDS csrc/ops/*.cpp)
file(GLOB cuda_ops CONFIGURE_DEPENDS csrc/ops/*_cuda.cpp)
file(GLOB python_ops CONFIGURE_DEPENDS csrc/ops/optim/*.cpp csrc/bindings.cpp)
set(python_cuda_ops "${CMAKE_CURRENT_SOURCE_DIR}/csrc/ops/backend_cuda.cpp"
  "${CMAKE_CURRENT_SOURCE_DIR}/csrc/ops/module_cuda.cpp")
list(REMOVE_ITEM ops ${cuda_ops})
list(REMOVE_ITEM cuda_ops ${python_cuda_ops})

# Compiled as one, for the time that torch's headers take.
file(GLOB autograd csrc/ops/activation.cpp csrc/ops/*_autograd.cpp)
set_source_files_properties(${autograd} PROPERTIES UNITY_GROUP autograd)
set_source_files_properties(csrc/ops/batch_norm.cpp csrc/ops/batch_norm_sync.cpp csrc/ops/dropout.cpp
  PROPERTIES UNITY_GROUP operators)

add_custom_target(cuda_bindings)  # their objects: all that can be had of them with a CPU torch
foreach(minor IN LISTS BRAZE_MINORS)
  get_target_property(root torch${minor} BRAZE_ROOT)
  add_library(ops.torch${minor} OBJECT ${ops})
  # OpenMP by flag, not by target: the extension must share torch's libgomp.
  target_compile_options(ops.torch${minor} PRIVATE ${OpenMP_CXX_FLAGS})
  target_link_libraries(ops.torch${minor} PRIVATE torch${minor})
  braze_options(ops.torch${minor})
  if(BRAZE_CUDA_MODE STREQUAL on)
    set(cuda_includes "${BRAZE_TOOLKIT}/include")
    # The one c10/cuda header that CPU builds of torch leave out.
    if(NOT EXISTS "${root}/include/c10/cuda/impl/cuda_cmake_macros.h")
      file(CONFIGURE OUTPUT torch_cuda_stub/c10/cuda/impl/cuda_cmake_macros.h
        CONTENT "#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
      list(APPEND cuda_includes "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub")
    endif()
    add_library(ops_cuda.torch${minor} OBJECT ${cuda_ops})
    target_include_directories(ops_cuda.torch${minor} SYSTEM PRIVATE ${cuda_includes})
    target_link_libraries(ops_cuda.torch${minor} PRIVATE torch${minor})
    braze_options(ops_cuda.torch${minor})
    add_dependencies(cuda_bindings ops_cuda.torch${minor})
  endif()

  foreach(python IN LISTS pythons)
    execute_process(
      COMMAND "${python}" -c
        "import sysconfig as s; print(s.get_path('include'), s.get_config_var('EXT_SUFFIX')[1:-3], sep=';', end='')"
      OUTPUT_VARIABLE facts RESULT_VARIABLE failed)
    if(failed)
      message(FATAL_ERROR "BRAZE_PYTHONS has ${python}, which does not run.")
    endif()
    list(GET facts 0 include)
    list(GET facts 1 abi)
    if(NOT EXISTS "${include}/Python.h")
      message(FATAL_ERROR "${python} has no headers: ${include}/Python.h is missing. Install its development package.")
    endif()
    if("${minor}.${abi}" IN_LIST BRAZE_LEFT_OUT)
      continue()
    endif()
    set(module _C.torch${minor}.${abi})
    add_library(${module} MODULE ${python_ops})
    target_compile_options(${module} PRIVATE ${OpenMP_CXX_FLAGS})
    target_link_options(${module} PRIVATE ${OpenMP_CXX_FLAGS})
    target_include_directories(${module} SYSTEM PRIVATE "${include}")
    target_link_libraries(${module} PRIVATE ops.torch${minor} braze_kernels torch${minor})
    braze_options(${module})
    install(TARGETS ${module} DESTINATION braze)
    if(NOT BRAZE_CUDA_MODE STREQUAL on)
      continue()
    endif()
    set(module _cuda.torch${minor}.${abi})
    add_library(objects${module} OBJECT ${python_cuda_ops})
    target_include_directories(objects${module} SYSTEM PRIVATE "${include}" ${cuda_includes})
    target_link_libraries(objects${module} PRIVATE torch${minor})
    braze_options(objects${module})
    add_dependencies(cuda_bindings objects${module})
    if(EXISTS "${root}/lib/libc10_cuda.so")
      add_library(${module} MODULE $<TARGET_OBJECTS:objects${module}>)
      target_link_libraries(${module} PRIVATE ops_cuda.torch${minor} braze_cuda torch${minor} c10_cuda torch_cuda)
      braze_options(${module})
      set_target_properties(${module} PROPERTIES LINKER_LANGUAGE CXX)
      install(TARGETS ${module} DESTINATION braze)
    endif()
  endforeach()
endforeach()
