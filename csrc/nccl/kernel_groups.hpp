// What ties pycomm's own kernels on symmetric memory to the life of a communicator: it makes them stop when the
// communicator fails, and sees when one of them has given up.
//
// A group of kernels has an abort word in device memory (SignalPad::abort of its own pad, which its kernels look at
// before they write to a peer) and a status in host memory that the device maps (Status, of which the kernels write
// `code` last). Both belong to whoever made the group.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "nccl/driver.hpp"

namespace pycomm::nccl {

/// Status of cuda/device/signal_pad.hpp, read by the host.
struct KernelStatus {
  std::uint32_t code;  // not 0: a kernel has given up
  std::int32_t rank;   // that it waited for
  std::int32_t block;
  std::uint32_t expected;
  std::uint32_t seen;
};

class KernelGroups {
 public:
  explicit KernelGroups(const driver::Context& context) : context_(context) {}

  /// Watch a group by its abort word (an address of the device) and its status (an address of the host). It is stopped
  /// at once if the communicator has failed.
  void add(driver::abi::DevicePointer abort_word, const KernelStatus* status);
  /// Its kernels are over and its memory goes.
  void remove(driver::abi::DevicePointer abort_word);
  /// The statuses of groups whose kernels have given up.
  std::vector<KernelStatus> failures() const;
  /// Set all abort words, now and for groups that are added later. Waits for no kernel: it has a stream of its own.
  void stop();

 private:
  struct Group {
    driver::abi::DevicePointer abort_word;
    const KernelStatus* status;
  };

  void set(driver::abi::DevicePointer abort_word);

  const driver::Context& context_;
  mutable std::mutex mutex_;
  std::vector<Group> groups_;
  std::unique_ptr<driver::Stream> stream_;
  bool stopped_ = false;
};

}  // namespace pycomm::nccl
