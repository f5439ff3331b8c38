#include "nccl/kernel_groups.hpp"

#include <algorithm>
#include <atomic>

namespace pycomm::nccl {

void KernelGroups::add(driver::abi::DevicePointer abort_word, const KernelStatus* status) {
  const std::lock_guard lock(mutex_);
  const driver::Context::Current current(context_);
  if (!stream_) stream_ = std::make_unique<driver::Stream>(context_);
  groups_.push_back({abort_word, status});
  if (stopped_) set(abort_word);
}

void KernelGroups::remove(driver::abi::DevicePointer abort_word) {
  const std::lock_guard lock(mutex_);
  std::erase_if(groups_, [&](const Group& group) { return group.abort_word == abort_word; });
}

std::vector<KernelStatus> KernelGroups::failures() const {
  const std::lock_guard lock(mutex_);
  std::vector<KernelStatus> found;
  for (const Group& group : groups_) {
    // The kernel has written the other fields before, with release at system scope.
    std::atomic_ref code(const_cast<std::uint32_t&>(group.status->code));
    if (code.load(std::memory_order_acquire) != 0) found.push_back(*group.status);
  }
  return found;
}

void KernelGroups::stop() {
  const std::lock_guard lock(mutex_);
  stopped_ = true;
  const driver::Context::Current current(context_);
  for (const Group& group : groups_) set(group.abort_word);
}

void KernelGroups::set(driver::abi::DevicePointer abort_word) {
  const driver::Driver& driver = context_.driver();
  driver.check(driver.memset_d32_async(abort_word, 1, 1, stream_->get()), "cuMemsetD32Async");
}

}  // namespace pycomm::nccl
