// The one place that starts kernels, and the one that turns a DType into a type.
#pragma once

#include "cuda/device/convert.cuh"
#include "cuda/kernels/launch.hpp"
#include "pycomm/types.hpp"

namespace pycomm::cuda {

inline void check_launch(const char* name, cudaError_t status) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // reported here; the next call shall not report it again
  throw Error(ErrorKind::kGeneral, std::string(name) + ": " + cudaGetErrorString(status));
}

/// Whether a kernel with these params waits for other ranks.
template <class Params>
bool waits_for_ranks(const Params& params) {
  if constexpr (requires { params.channel.group; }) {
    return true;
  } else if constexpr (requires { params.group; }) {
    return params.group.world_size > 1;
  } else {
    return false;
  }
}

/// Kernels that wait for each other end only if all their blocks run at the same time: std::invalid_argument where this
/// GPU cannot have them all resident.
template <class Params>
void check_resident(const char* name, void (*kernel)(Params), const LaunchShape& shape, std::size_t shared_bytes) {
  int device = 0;
  int num_multiprocessors = 0;
  check_launch(name, cudaGetDevice(&device));
  check_launch(name, cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (shape.num_blocks * shape.num_waiting <= num_multiprocessors) return;  // one block fits on each
  int blocks_each = 0;
  check_launch(name,
               cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, shape.num_threads, shared_bytes));
  const int most = blocks_each * num_multiprocessors;
  if (shape.num_blocks * shape.num_waiting <= most) return;
  throw std::invalid_argument(
      std::string(name) + ": " + std::to_string(shape.num_waiting) + " kernels of " + std::to_string(shape.num_blocks) +
      " blocks wait for each other on this GPU, which runs " + std::to_string(most) +
      " such blocks at a time; take at most " + std::to_string(most / shape.num_waiting) + " blocks a kernel");
}

/// Starts kernel(params) on the shape's stream. Throws what the runtime says, with the kernel's name.
template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, const Params& params,
            std::size_t shared_bytes = 0) {
  if (waits_for_ranks(params)) check_resident(name, kernel, shape, shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.num_threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = shape.stream;
  check_launch(name, cudaLaunchKernelEx(&config, kernel, params));
}

template <class T>
struct TypeTag {
  using Type = T;
};

/// Calls function(TypeTag<T>) for the type that float32, float16 or bfloat16 elements have in kernels.
template <class Function>
void dispatch_float(const char* kernel, DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(TypeTag<float>{});
    case DType::kFloat16:
      return function(TypeTag<Float16>{});
    case DType::kBFloat16:
      return function(TypeTag<BFloat16>{});
    default:
      throw std::invalid_argument(std::string(kernel) + ": dtype " + name_of(dtype) +
                                  "; it takes float32, float16 and bfloat16");
  }
}

/// The same for every dtype.
template <class Function>
void dispatch(const char* kernel, DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat64:
      return function(TypeTag<double>{});
    case DType::kInt8:
      return function(TypeTag<std::int8_t>{});
    case DType::kUInt8:
      return function(TypeTag<std::uint8_t>{});
    case DType::kInt32:
      return function(TypeTag<std::int32_t>{});
    case DType::kInt64:
      return function(TypeTag<std::int64_t>{});
    default:
      return dispatch_float(kernel, dtype, function);
  }
}

inline void check_op(const char* kernel, DType dtype, ReduceOp op) {
  if (op == ReduceOp::kAvg && !is_floating_point(dtype)) {
    throw std::invalid_argument(std::string(kernel) + ": \"avg\" of " + name_of(dtype) + " is not defined");
  }
}

}  // namespace pycomm::cuda
