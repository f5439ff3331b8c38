#include "cuda/runtime/handles.hpp"
#include "cuda/runtime/symmetric_memory.hpp"

namespace pycomm::cuda {
namespace {

constexpr int kCollectiveSymmetric = 1;  // NCCL_WIN_COLL_SYMMETRIC

class WindowMemory final : public SymmetricMemory {
 public:
  WindowMemory(int world_size, int rank, std::size_t bytes, const NcclWindows& nccl)
      : SymmetricMemory("windows", world_size, bytes), nccl_(nccl) {
    check("ncclMemAlloc", nccl_.mem_alloc(&memory_, bytes));
    try {
      PYCOMM_CUDA_CHECK(cudaMemset(memory_, 0, bytes));
      PYCOMM_CUDA_CHECK(cudaDeviceSynchronize());
      check("ncclCommWindowRegister",
            nccl_.window_register(nccl_.communicator, memory_, bytes, &window_, kCollectiveSymmetric));
      for (int peer = 0; peer < world_size; ++peer) parts_[static_cast<std::size_t>(peer)] = address_of(peer, rank);
    } catch (...) {
      release();
      throw;
    }
  }
  ~WindowMemory() override { release(); }

 private:
  std::byte* address_of(int peer, int rank) {
    if (peer == rank) return static_cast<std::byte*>(memory_);
    void* address = nullptr;
    check("ncclGetPeerDevicePointer", nccl_.peer_pointer(window_, 0, peer, &address));
    if (address == nullptr) {
      throw Error(ErrorKind::kUnavailable, "NCCL's window of rank " + std::to_string(peer) +
                                               " is not mapped here: the two GPUs are not in one NVLink domain, or "
                                               "registration does nothing in this NCCL");
    }
    return static_cast<std::byte*>(address);
  }

  void check(const char* call, int result) const {
    if (result != 0) throw Error(ErrorKind::kGeneral, std::string(call) + ": " + nccl_.error_string(result));
  }

  void release() {
    if (window_ != nullptr) static_cast<void>(nccl_.window_deregister(nccl_.communicator, window_));
    if (memory_ != nullptr) static_cast<void>(nccl_.mem_free(memory_));
  }

  NcclWindows nccl_;
  void* memory_ = nullptr;
  void* window_ = nullptr;
};

}  // namespace

std::unique_ptr<SymmetricMemory> nccl_window_memory(int device, int world_size, int rank, std::size_t bytes,
                                                    const NcclWindows& nccl, const std::function<void()>& barrier) {
  if (nccl.window_register == nullptr || nccl.peer_pointer == nullptr) {
    throw Error(ErrorKind::kUnavailable,
                "this NCCL has no host-visible window pointers (2.29 or newer has them): on one host, shared handles "
                "do the same");
  }
  const DeviceScope scope(device);
  auto memory = std::make_unique<WindowMemory>(world_size, rank, bytes, nccl);
  barrier();
  return memory;
}

}  // namespace pycomm::cuda
