# Several sources go into one run of the compiler, whose time is mostly spent on headers: less than half of the time in
# all. -DCMAKE_UNITY_BUILD=OFF compiles each file alone, as one wants while changing them.
if(NOT DEFINED CMAKE_UNITY_BUILD)
  set(CMAKE_UNITY_BUILD ON)
endif()
if(NOT DEFINED CMAKE_UNITY_BUILD_BATCH_SIZE)
  set(CMAKE_UNITY_BUILD_BATCH_SIZE 6)
endif()
# Each takes in the names of one namespace, which others have, too.
set_source_files_properties(
  csrc/bindings/bind_nccl.cpp csrc/bindings/bind_overlapped_matmul.cpp csrc/bindings/bind_rank_group.cpp
  PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
