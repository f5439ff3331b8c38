// After fork() the child shares the parent's memory segments and sockets, but is not a rank: it must neither hold the
// descriptors open nor write a flag. The child's handler closes what was registered here.
#pragma once

#include <cstdint>
#include <functional>

namespace pycomm::host {

/// 0 in the process that loaded the extension, one more in each of its forked descendants' generations.
std::uint64_t fork_generation();

/// Runs `in_child` in the child of every fork() while it lives; hold it as the last member of what `in_child` touches.
/// The child is single-threaded then, and any mutex of the parent may be locked: close descriptors, set fields, nothing
/// more.
class ForkGuard {
 public:
  explicit ForkGuard(std::function<void()> in_child);
  ForkGuard(const ForkGuard&) = delete;  // registered by address
  ForkGuard& operator=(const ForkGuard&) = delete;
  ~ForkGuard();

  void run() const { in_child_(); }

 private:
  std::function<void()> in_child_;
};

}  // namespace pycomm::host
