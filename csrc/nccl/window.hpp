// Memory of every rank of a communicator that all of them map, as NCCL arranges it: for ranks of an NVLink domain, on
// one or several hosts. Needs NCCL 2.29.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "nccl/communicator.hpp"

namespace pycomm::nccl {

class Window {
 public:
  /// Allocates this rank's memory, `bytes` of it; open() maps it. Not collective, so that ranks can tell each other
  /// whether all have theirs before they wait for each other. Throws kUnavailable: this NCCL has no windows.
  Window(std::shared_ptr<Communicator> communicator, std::size_t bytes);
  Window(const Window&) = delete;  // one owner gives the memory back
  Window& operator=(const Window&) = delete;
  ~Window();

  /// Collective. Throws kUnavailable if this rank does not see a peer's memory.
  void open(double timeout_s);

  std::size_t bytes() const { return bytes_; }
  int rank() const { return communicator_->rank(); }
  /// By rank, after open().
  const std::vector<std::byte*>& parts() const { return parts_; }

 private:
  std::shared_ptr<Communicator> communicator_;
  std::size_t bytes_;
  void* memory_ = nullptr;
  abi::Window window_ = nullptr;
  std::vector<std::byte*> parts_;
};

}  // namespace pycomm::nccl
