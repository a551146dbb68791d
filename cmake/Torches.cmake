# Finds the torches to build bindings for, without importing any and without torch's CMake package, which rewrites
# compiler flags, does not know libtorch_python and needs a working CUDA toolkit. Sets
#   BRAZE_MINORS        their minors, such as 2.13
#   TORCH_CUDA_VERSION  the CUDA of the first that has one; empty if none has
# and defines for each the target torch<minor>, with the properties BRAZE_VERSION and BRAZE_ROOT.
set(BRAZE_TORCHES "" CACHE STRING
  "Folders of the torch packages to build for, of any CPython. Default: the installed one")

set(find_torch [=[
import importlib.util, pathlib, runpy, sys
spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit(1)
print(pathlib.Path(spec.origin).parent.as_posix(), end="")
]=])
set(torches ${BRAZE_TORCHES})
if(NOT torches)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "${find_torch}" OUTPUT_VARIABLE torches RESULT_VARIABLE missing)
  if(missing)
    message(FATAL_ERROR
      "torch was not found for ${Python_EXECUTABLE}.\n"
      "Install the torch you want to use braze with, then build without isolation:\n"
      "  pip install torch scikit-build-core ninja cmake\n"
      "  pip install --no-build-isolation .\n")
  endif()
endif()

set(BRAZE_MINORS "")
set(TORCH_CUDA_VERSION "")
foreach(root IN LISTS torches)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import runpy, sys; v = runpy.run_path(sys.argv[1]); print(v['__version__'], v.get('cuda') or '', sep=';', end='')"
      "${root}/version.py"
    OUTPUT_VARIABLE facts RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    message(FATAL_ERROR "BRAZE_TORCHES has ${root}, which is no folder of a torch package: no version.py can be read there.")
  endif()
  list(GET facts 0 version)
  list(GET facts 1 cuda)
  if(version VERSION_LESS 2.11)
    message(FATAL_ERROR "braze needs torch 2.11 or newer; ${root} is ${version}.\n"
                        "  pip install --upgrade torch\n")
  endif()
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" minor "${version}")
  if(minor IN_LIST BRAZE_MINORS)
    message(FATAL_ERROR "BRAZE_TORCHES has two torches ${minor}, and bindings serve all of a minor: leave one out.")
  endif()
  list(APPEND BRAZE_MINORS ${minor})
  if(cuda AND NOT TORCH_CUDA_VERSION)
    set(TORCH_CUDA_VERSION ${cuda})
  endif()
  add_library(torch${minor} INTERFACE IMPORTED)
  target_include_directories(torch${minor} SYSTEM INTERFACE
    "${root}/include" "${root}/include/torch/csrc/api/include")
  target_link_directories(torch${minor} INTERFACE "${root}/lib")
  target_link_libraries(torch${minor} INTERFACE c10 torch_cpu torch torch_python)
  # torch's headers name themselves in messages.
  target_compile_options(torch${minor} INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${root}=torch>")
  set_target_properties(torch${minor} PROPERTIES BRAZE_VERSION "${version}" BRAZE_ROOT "${root}")
endforeach()
