// Symmetric memory on GPUs: one allocation of every rank of a group, all of them mapped here. One type, three
// providers:
//
//   virtual_rank_memory    all ranks are this process's and share one GPU: tests and measurements
//   shared_handle_memory   ranks are processes of one host: CUDA's virtual memory, passed as file descriptors
//   window_memory          ranks of an NVLink domain, on one or several hosts: NCCL's windows
//
// Kernels see addresses only and do not know which one made them. Needs no header of CUDA, so that bindings are the
// same in every build; without CUDA code the functions throw kUnavailable (csrc/cuda/absent.cpp).
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

namespace pycomm::cuda {

class SymmetricMemory {
 public:
  SymmetricMemory(const SymmetricMemory&) = delete;  // one owner unmaps it
  SymmetricMemory& operator=(const SymmetricMemory&) = delete;
  virtual ~SymmetricMemory() = default;

  const char* provider() const { return provider_; }  // "virtual", "handles" or "windows"
  int world_size() const { return static_cast<int>(parts_.size()); }
  std::size_t bytes() const { return bytes_; }  // of each part
  /// Rank `rank`'s, as this process maps it: at least 256-byte aligned, zero when it was made.
  std::byte* part(int rank) const { return parts_.at(static_cast<std::size_t>(rank)); }

 protected:
  SymmetricMemory(const char* provider, int world_size, std::size_t bytes)
      : parts_(static_cast<std::size_t>(world_size)), provider_(provider), bytes_(bytes) {}

  std::vector<std::byte*> parts_;

 private:
  const char* provider_;
  std::size_t bytes_;
};

std::unique_ptr<SymmetricMemory> virtual_rank_memory(int device, int world_size, std::size_t bytes);

/// Gives every rank a descriptor of every rank: takes this rank's, which stays the caller's, and returns those of all,
/// by rank, for the caller to close. Collective, and a barrier.
using ExchangeFds = std::function<std::vector<int>(int fd)>;

/// Collective: all ranks give the same `bytes`. A rank that cannot have its memory takes part in the exchange all the
/// same, and then throws, as do those that cannot map another's: whoever calls this lets the ranks tell each other.
std::unique_ptr<SymmetricMemory> shared_handle_memory(int device, int rank, int world_size, std::size_t bytes,
                                                      const ExchangeFds& exchange);

/// Collective, as the last step of opening a window of NCCL's (csrc/nccl/window.hpp), whose `parts` these are, by rank:
/// clears this rank's. No rank may use the memory before all have come back. `keep`: what owns the window.
std::unique_ptr<SymmetricMemory> window_memory(int device, int rank, const std::vector<std::byte*>& parts,
                                               std::size_t bytes, std::shared_ptr<const void> keep);

}  // namespace pycomm::cuda
