#include "cuda/device/signal_pad.hpp"
#include "cuda/runtime/handles.hpp"
#include "cuda/runtime/symmetric_memory.hpp"

namespace pycomm::cuda {
namespace {

/// One allocation a rank, so that memcheck sees where one rank's memory ends.
class VirtualRankMemory final : public SymmetricMemory {
 public:
  VirtualRankMemory(int device, int world_size, std::size_t bytes) : SymmetricMemory("virtual", world_size, bytes) {
    const DeviceScope scope(device);
    for (std::byte*& part : parts_) {
      memory_.push_back(OwnedMemory::on_device(bytes));
      part = memory_.back().data();
      if (bytes > 0) PYCOMM_CUDA_CHECK(cudaMemset(part, 0, bytes));
    }
    PYCOMM_CUDA_CHECK(cudaDeviceSynchronize());
  }

 private:
  std::vector<OwnedMemory> memory_;
};

}  // namespace

std::unique_ptr<SymmetricMemory> virtual_rank_memory(int device, int world_size, std::size_t bytes) {
  if (world_size < 1 || world_size > kMaxRanks) {
    throw std::invalid_argument(std::to_string(world_size) + " virtual ranks: 1 to " + std::to_string(kMaxRanks) +
                                " are possible");
  }
  return std::make_unique<VirtualRankMemory>(device, world_size, bytes);
}

}  // namespace pycomm::cuda
