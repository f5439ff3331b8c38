#include "cuda/runtime/handles.hpp"
#include "cuda/runtime/symmetric_memory.hpp"

namespace pycomm::cuda {
namespace {

class WindowMemory final : public SymmetricMemory {
 public:
  WindowMemory(const std::vector<std::byte*>& parts, std::size_t bytes, std::shared_ptr<const void> keep)
      : SymmetricMemory("windows", static_cast<int>(parts.size()), bytes), keep_(std::move(keep)) {
    parts_ = parts;
  }
  ~WindowMemory() override { static_cast<void>(cudaDeviceSynchronize()); }  // kernels may still be using it

 private:
  std::shared_ptr<const void> keep_;
};

}  // namespace

std::unique_ptr<SymmetricMemory> window_memory(int device, int rank, const std::vector<std::byte*>& parts,
                                               std::size_t bytes, std::shared_ptr<const void> keep) {
  const DeviceScope scope(device);
  auto memory = std::make_unique<WindowMemory>(parts, bytes, std::move(keep));
  PYCOMM_CUDA_CHECK(cudaMemset(memory->part(rank), 0, bytes));
  PYCOMM_CUDA_CHECK(cudaDeviceSynchronize());
  return memory;
}

}  // namespace pycomm::cuda
