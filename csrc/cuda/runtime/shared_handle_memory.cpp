// CUDA's virtual memory between processes of one host: each rank creates its part, exports it as a file descriptor, and
// maps the descriptors of all. Each process and device has its own addresses.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <utility>

#include "cuda/device/signal_pad.hpp"
#include "cuda/runtime/driver.hpp"
#include "cuda/runtime/handles.hpp"
#include "cuda/runtime/symmetric_memory.hpp"

namespace pycomm::cuda {
namespace {

constexpr CUmemAllocationHandleType kFd = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// Descriptors that are closed at the end of the scope.
class Fds {
 public:
  explicit Fds(std::vector<int> fds) : fds_(std::move(fds)) {}
  Fds(const Fds&) = delete;
  Fds& operator=(const Fds&) = delete;
  ~Fds() {
    for (const int fd : fds_) ::close(fd);
  }
  int operator[](int i) const { return fds_.at(static_cast<std::size_t>(i)); }

 private:
  std::vector<int> fds_;
};

/// A part's physical memory; the mapping keeps it alive after the handle is gone.
class Handle {
 public:
  Handle(std::size_t bytes, const CUmemAllocationProp& properties) {
    driver().check(driver().mem_create(&handle_, bytes, &properties, 0), "cuMemCreate");
  }
  explicit Handle(int fd) {
    void* const shareable = reinterpret_cast<void*>(static_cast<std::uintptr_t>(fd));  // NOLINT: as the driver wants it
    driver().check(driver().mem_import(&handle_, shareable, kFd), "cuMemImportFromShareableHandle");
  }
  Handle(const Handle&) = delete;  // one owner releases it
  Handle& operator=(const Handle&) = delete;
  ~Handle() { static_cast<void>(driver().mem_release(handle_)); }

  CUmemGenericAllocationHandle get() const { return handle_; }
  int exported() const {
    int fd = -1;
    driver().check(driver().mem_export(&fd, handle_, kFd, 0), "cuMemExportToShareableHandle");
    return fd;
  }

 private:
  CUmemGenericAllocationHandle handle_ = 0;
};

class SharedHandleMemory final : public SymmetricMemory {
 public:
  /// This rank's part alone, cleared.
  SharedHandleMemory(int device, int rank, int world_size, std::size_t bytes)
      : SymmetricMemory("handles", world_size, bytes) {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = kFd;
    properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
    access_.location = properties.location;
    access_.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    std::size_t unit = 0;
    driver().check(driver().mem_get_allocation_granularity(&unit, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                   "cuMemGetAllocationGranularity");
    mapped_bytes_ = (std::max<std::size_t>(bytes, 1) + unit - 1) / unit * unit;
    try {
      const Handle own(mapped_bytes_, properties);
      map(rank, own);
      PYCOMM_CUDA_CHECK(cudaMemset(part(rank), 0, mapped_bytes_));
      PYCOMM_CUDA_CHECK(cudaDeviceSynchronize());  // before anyone can map it
      fd_ = own.exported();
    } catch (...) {
      unmap();
      throw;
    }
  }
  ~SharedHandleMemory() override { unmap(); }

  /// This rank's descriptor, once.
  int take_fd() { return std::exchange(fd_, -1); }

  void map_peers(int rank, const Fds& fds) {
    for (int peer = 0; peer < world_size(); ++peer) {
      if (peer != rank) map(peer, Handle(fds[peer]));
    }
  }

 private:
  void map(int rank, const Handle& handle) {
    CUdeviceptr address = 0;
    driver().check(driver().mem_address_reserve(&address, mapped_bytes_, 0, 0, 0), "cuMemAddressReserve");
    CUresult result = driver().mem_map(address, mapped_bytes_, 0, handle.get(), 0);
    if (result != CUDA_SUCCESS) {
      static_cast<void>(driver().mem_address_free(address, mapped_bytes_));
      driver().check(result, "cuMemMap");
    }
    parts_[static_cast<std::size_t>(rank)] = reinterpret_cast<std::byte*>(address);  // unmap() undoes it from here on
    driver().check(driver().mem_set_access(address, mapped_bytes_, &access_, 1), "cuMemSetAccess");
  }

  void unmap() {
    static_cast<void>(cudaDeviceSynchronize());  // kernels may still be using it
    for (std::byte* const address : parts_) {
      if (address == nullptr) continue;
      static_cast<void>(driver().mem_unmap(reinterpret_cast<CUdeviceptr>(address), mapped_bytes_));
      static_cast<void>(driver().mem_address_free(reinterpret_cast<CUdeviceptr>(address), mapped_bytes_));
    }
  }

  CUmemAccessDesc access_{};
  std::size_t mapped_bytes_ = 0;
  int fd_ = -1;
};

}  // namespace

std::unique_ptr<SymmetricMemory> shared_handle_memory(int device, int rank, int world_size, std::size_t bytes,
                                                      const ExchangeFds& exchange) {
  if (world_size < 1 || world_size > kMaxRanks || rank < 0 || rank >= world_size) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(world_size) + ": 1 to " +
                                std::to_string(kMaxRanks) + " ranks can share memory");
  }
  std::unique_ptr<SharedHandleMemory> memory;
  std::exception_ptr failure;
  int fd = -1;
  try {
    const DeviceScope scope(device);
    PYCOMM_CUDA_CHECK(cudaFree(nullptr));  // makes the device's context, which the driver's functions need
    memory = std::make_unique<SharedHandleMemory>(device, rank, world_size, bytes);
    fd = memory->take_fd();
  } catch (const Error&) {
    failure = std::current_exception();
    fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC);  // the others wait for a descriptor; this one nobody can map
  }
  const Fds mine({fd});
  const Fds all(exchange(fd));
  if (failure) std::rethrow_exception(failure);
  const DeviceScope scope(device);
  memory->map_peers(rank, all);
  return memory;
}

}  // namespace pycomm::cuda
