# The translation units of the kernels, one an instruction set, each with flags of its own.
include(CheckCXXCompilerFlag)

# Which flags: dispatch.cpp must ask the processor for every one of them.
set(SIXFOLD_FLAGS_portable "")
set(SIXFOLD_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
set(SIXFOLD_FLAGS_avx512
    -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512vbmi
    -mavx512vbmi2
    -mavx2 -mfma -mf16c -mbmi2 -mprefer-vector-width=512)
set(SIXFOLD_FLAGS_neon -march=armv8.2-a+dotprod+fp16)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(SIXFOLD_ISAS portable avx2 avx512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(SIXFOLD_ISAS portable neon)
else()
  set(SIXFOLD_ISAS portable)
endif()

# Not an instruction set of its own: what AVX-512's kernels of nearest/ take where it is there.
set(SIXFOLD_FLAGS_amx -mamx-tile -mamx-int8)

function(sixfold_add_amx target)
  check_cxx_compiler_flag("-mamx-tile -mamx-int8" SIXFOLD_COMPILES_amx)
  if(SIXFOLD_COMPILES_amx AND CMAKE_SYSTEM_NAME STREQUAL "Linux" AND "avx512" IN_LIST SIXFOLD_ISAS)
    set(source ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../nearest/many_amx.cpp)
    target_sources(${target} PRIVATE ${source})
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${SIXFOLD_FLAGS_amx}")
    target_compile_definitions(${target} PRIVATE SIXFOLD_HAS_AMX)
  endif()
endfunction()

function(sixfold_add_isas target)
  sixfold_add_amx(${target})
  foreach(name IN LISTS SIXFOLD_ISAS)
    string(REPLACE ";" " " flags "${SIXFOLD_FLAGS_${name}}")
    check_cxx_compiler_flag("${flags}" SIXFOLD_COMPILES_${name})
    if(NOT SIXFOLD_COMPILES_${name})
      message(STATUS "Kernels for ${name} are left out: the compiler does not know ${flags}")
      continue()
    endif()
    set(source ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/kernels_${name}.cpp)
    target_sources(${target} PRIVATE ${source})
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${SIXFOLD_FLAGS_${name}}")
    string(TOUPPER ${name} upper)
    target_compile_definitions(${target} PRIVATE SIXFOLD_HAS_${upper})
  endforeach()
endfunction()
