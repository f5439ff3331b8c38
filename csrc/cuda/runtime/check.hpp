// The one check of what the CUDA runtime returns.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "pycomm/error.hpp"

namespace pycomm::cuda {

/// Throws Error for a status that is no success, which is then no longer the runtime's last error.
inline void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  ErrorKind kind = ErrorKind::kGeneral;
  if (status == cudaErrorMemoryAllocation) kind = ErrorKind::kOutOfMemory;
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) kind = ErrorKind::kUnavailable;
  const std::string prefix = kind == ErrorKind::kUnavailable ? "no GPU that CUDA can use: " : "";
  const std::string path = file;
  const std::size_t in_repository = path.rfind("csrc/");
  const std::string where = in_repository == std::string::npos ? path : path.substr(in_repository);
  throw Error(kind,
              prefix + call + ": " + cudaGetErrorString(status) + " (" + where + ":" + std::to_string(line) + ")");
}

}  // namespace pycomm::cuda

#define PYCOMM_CUDA_CHECK(call) ::pycomm::cuda::check((call), #call, __FILE__, __LINE__)
