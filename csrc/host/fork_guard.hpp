// After fork() the child shares the parent's memory segments and sockets, but is not a rank: it must neither hold the
// descriptors open nor write a flag. The child's handler closes what was registered here.
#pragma once

#include <cstdint>

namespace pycomm::host {

/// 0 in the process that loaded the extension, one more in each of its forked descendants' generations.
std::uint64_t fork_generation();

/// Something that the child of a fork must give up. on_fork() runs in the child, single-threaded, where any mutex of
/// the parent may be locked: it may close descriptors and set fields, nothing more.
class ForkAware {
 public:
  ForkAware();
  ForkAware(const ForkAware&) = delete;  // registered by address
  ForkAware& operator=(const ForkAware&) = delete;
  virtual ~ForkAware();

  virtual void on_fork() noexcept = 0;
};

}  // namespace pycomm::host
