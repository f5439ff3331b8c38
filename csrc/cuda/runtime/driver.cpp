#include "cuda/runtime/driver.hpp"

#include "cuda/runtime/stream_flags.hpp"
#include "pycomm/shared_library.hpp"

namespace pycomm::cuda {
namespace {

/// By the names that the library exports: `_v2` is what the header's macros stand for.
Driver load() {
  const SharedLibrary library("CUDA's driver", {"libcuda.so.1"});
  Driver driver{};
  library.get(driver.get_error_string, "cuGetErrorString");
  library.get(driver.mem_get_allocation_granularity, "cuMemGetAllocationGranularity");
  library.get(driver.mem_create, "cuMemCreate");
  library.get(driver.mem_release, "cuMemRelease");
  library.get(driver.mem_export, "cuMemExportToShareableHandle");
  library.get(driver.mem_import, "cuMemImportFromShareableHandle");
  library.get(driver.mem_address_reserve, "cuMemAddressReserve");
  library.get(driver.mem_address_free, "cuMemAddressFree");
  library.get(driver.mem_map, "cuMemMap");
  library.get(driver.mem_unmap, "cuMemUnmap");
  library.get(driver.mem_set_access, "cuMemSetAccess");
  library.get(driver.stream_wait_value, "cuStreamWaitValue32_v2");
  library.get(driver.stream_write_value, "cuStreamWriteValue32_v2");
  return driver;
}

}  // namespace

void Driver::check(CUresult result, const char* call) const {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  if (get_error_string(result, &text) != CUDA_SUCCESS || text == nullptr) text = "unknown error";
  const ErrorKind kind = result == CUDA_ERROR_OUT_OF_MEMORY ? ErrorKind::kOutOfMemory : ErrorKind::kGeneral;
  throw Error(kind, std::string(call) + ": " + text);
}

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

void set_flag(Stream stream, std::uint32_t* flag, std::uint32_t value) {
  driver().check(driver().stream_write_value(stream, reinterpret_cast<CUdeviceptr>(flag), value, 0),
                 "cuStreamWriteValue32");
}

void await_flag(Stream stream, std::uint32_t* flag, std::uint32_t value) {
  driver().check(
      driver().stream_wait_value(stream, reinterpret_cast<CUdeviceptr>(flag), value, CU_STREAM_WAIT_VALUE_GEQ),
      "cuStreamWaitValue32");
}

}  // namespace pycomm::cuda
