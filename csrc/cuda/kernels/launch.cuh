// The one place that starts kernels, and the one that turns a DType into a type.
#pragma once

#include "cuda/device/convert.cuh"
#include "cuda/kernels/launch.hpp"
#include "pycomm/types.hpp"

namespace pycomm::cuda {

/// Starts kernel(params) on the shape's stream. Throws what the runtime says, with the kernel's name.
template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, const Params& params,
            std::size_t shared_bytes = 0) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.num_threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = shape.stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, params);
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // reported here; the next call shall not report it again
    throw Error(ErrorKind::kGeneral, std::string(name) + ": " + cudaGetErrorString(status));
  }
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
