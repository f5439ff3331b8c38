# Every C++ source of the extension, and the flags of the files that are compiled once per SIMD level.
file(GLOB PYCOMM_HOST_SOURCES CONFIGURE_DEPENDS csrc/host/*.cpp)
file(GLOB PYCOMM_NCCL_SOURCES CONFIGURE_DEPENDS csrc/nccl/*.cpp)
file(GLOB PYCOMM_BINDING_SOURCES CONFIGURE_DEPENDS csrc/bindings/*.cpp)
file(GLOB PYCOMM_KERNEL_SOURCES CONFIGURE_DEPENDS csrc/cuda/kernels/*.cu)  # compiled where PYCOMM_WITH_CUDA
if(PYCOMM_WITH_CUDA)
  file(GLOB PYCOMM_CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/runtime/*.cpp csrc/cuda/matmul/*.cpp)
else()
  set(PYCOMM_CUDA_SOURCES csrc/cuda/absent.cpp csrc/cuda/matmul/plan.cpp)
endif()

# Reductions and optimizer steps are compiled once per SIMD level and chosen at run time, so one binary serves every
# processor of an architecture. aarch64 needs no second level: NEON is guaranteed there.
# -fno-math-errno: a square root is one instruction, which does not set errno. Its bits are the same.
if(CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  set(PYCOMM_AVX2 -mavx2 -mf16c)
  set(PYCOMM_AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c)
  set_source_files_properties(csrc/host/reduce_avx2.cpp PROPERTIES COMPILE_OPTIONS "${PYCOMM_AVX2}")
  set_source_files_properties(csrc/host/reduce_avx512.cpp PROPERTIES COMPILE_OPTIONS "${PYCOMM_AVX512}")
  set_source_files_properties(csrc/host/step_avx2.cpp PROPERTIES COMPILE_OPTIONS "${PYCOMM_AVX2};-fno-math-errno")
  set_source_files_properties(csrc/host/step_avx512.cpp PROPERTIES COMPILE_OPTIONS "${PYCOMM_AVX512};-fno-math-errno")
endif()
set_source_files_properties(csrc/host/step_baseline.cpp PROPERTIES COMPILE_OPTIONS "-fno-math-errno")

# Ranks compare this hash of all sources when they meet: two builds that differ must not share memory.
file(GLOB_RECURSE PYCOMM_HASHED_SOURCES CONFIGURE_DEPENDS csrc/*.hpp csrc/*.cpp csrc/*.cu csrc/*.cuh)
list(SORT PYCOMM_HASHED_SOURCES)
set(PYCOMM_SOURCE_HASHES "${PROJECT_VERSION}")
foreach(source IN LISTS PYCOMM_HASHED_SOURCES)
  file(SHA256 ${source} hash)
  string(APPEND PYCOMM_SOURCE_HASHES ${hash})
endforeach()
string(SHA256 PYCOMM_SOURCE_HASH "${PYCOMM_SOURCE_HASHES}")
string(SUBSTRING ${PYCOMM_SOURCE_HASH} 0 15 PYCOMM_BUILD_ID)
set_source_files_properties(csrc/host/build_id.cpp PROPERTIES COMPILE_DEFINITIONS PYCOMM_BUILD_ID=0x${PYCOMM_BUILD_ID}ULL)
