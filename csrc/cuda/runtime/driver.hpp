// What pycomm uses of the driver beyond the runtime: virtual memory that processes share, and flags that streams set
// and wait for. libcuda is loaded at run time: the extension must load where there is no driver.
#pragma once

#include <cuda.h>

namespace pycomm::cuda {

struct Driver {
  CUresult (*get_error_string)(CUresult, const char**);
  CUresult (*mem_get_allocation_granularity)(std::size_t*, const CUmemAllocationProp*,
                                             CUmemAllocationGranularity_flags);
  CUresult (*mem_create)(CUmemGenericAllocationHandle*, std::size_t, const CUmemAllocationProp*, unsigned long long);
  CUresult (*mem_release)(CUmemGenericAllocationHandle);
  CUresult (*mem_export)(void*, CUmemGenericAllocationHandle, CUmemAllocationHandleType, unsigned long long);
  CUresult (*mem_import)(CUmemGenericAllocationHandle*, void*, CUmemAllocationHandleType);
  CUresult (*mem_address_reserve)(CUdeviceptr*, std::size_t, std::size_t, CUdeviceptr, unsigned long long);
  CUresult (*mem_address_free)(CUdeviceptr, std::size_t);
  CUresult (*mem_map)(CUdeviceptr, std::size_t, std::size_t, CUmemGenericAllocationHandle, unsigned long long);
  CUresult (*mem_unmap)(CUdeviceptr, std::size_t);
  CUresult (*mem_set_access)(CUdeviceptr, std::size_t, const CUmemAccessDesc*, std::size_t);
  CUresult (*stream_wait_value)(CUstream, CUdeviceptr, cuuint32_t, unsigned);
  CUresult (*stream_write_value)(CUstream, CUdeviceptr, cuuint32_t, unsigned);

  /// Throws Error with the driver's words.
  void check(CUresult result, const char* call) const;
};

/// Loaded on first use. Throws kUnavailable: there is no libcuda, or it is too old.
const Driver& driver();

}  // namespace pycomm::cuda
