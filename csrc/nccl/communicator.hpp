// One rank's NCCL communicator: enqueues calls in issue order, and tells the watchdog what is under way. Non-blocking,
// so that an abort can end whatever hangs: a call counts as enqueued once NCCL no longer says "in progress", which a
// thread waits for here up to the call's deadline.
//
// Synchronous calls go to the caller's stream; asynchronous ones to the communicator's own, behind what the caller's
// stream holds. NCCL runs the calls of a communicator one after the other whatever their streams are, and so do
// pycomm's own kernels, with each other and with NCCL's: each of them may wait for the other ranks, who may be in
// another call.
//
// Addresses are the device's. All methods are thread-safe; none needs Python's lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "nccl/call_log.hpp"
#include "nccl/kernel_groups.hpp"
#include "nccl/library.hpp"
#include "nccl/operation.hpp"
#include "pycomm/backend.hpp"
#include "pycomm/error.hpp"

namespace pycomm::nccl {

/// A driver and the context of the GPU that a rank works on.
struct Device {
  Device(std::shared_ptr<const driver::Driver> the_driver, int index)
      : driver(std::move(the_driver)), context(*driver, index) {}

  std::shared_ptr<const driver::Driver> driver;
  driver::Context context;
};

struct CallOptions {
  driver::abi::Stream stream = nullptr;  // the caller's
  bool async_op = false;
  double timeout_s = 600;
  int max_ctas = 0;  // of this call; 0: NCCL's choice
};

using OperationPtr = std::shared_ptr<Operation>;
using Launch = std::function<void(driver::abi::Stream)>;

/// A send or a receive, and the memory of its tensor.
struct Message {
  Call call;
  void* data;
};

class Communicator {
 public:
  Communicator(std::shared_ptr<const Library> library, std::shared_ptr<const Device> device, int rank, int world_size,
               InterruptCheck interrupt);
  Communicator(const Communicator&) = delete;  // NCCL holds addresses of it
  Communicator& operator=(const Communicator&) = delete;
  /// Aborts what close() has not ended.
  ~Communicator();

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  CallLog& log() { return log_; }
  KernelGroups& kernels() { return kernels_; }

  /// Meet the other ranks.
  void connect(const abi::UniqueId& id, double timeout_s);
  /// All ranks call it; those of equal `color` (from 0; none: this rank is in no group) become a communicator of
  /// `world_size` ranks, in the order of `rank`.
  std::unique_ptr<Communicator> split(std::optional<int> color, int rank, int world_size, double timeout_s);

  /// A collective; of a barrier one byte of device memory is reduced in place.
  OperationPtr submit(const Call& call, const Operands& operands, const CallOptions& options);
  /// By one of pycomm's own kernels (call.route), which `launch` puts on the stream that it is given.
  OperationPtr submit_kernel(const Call& call, const CallOptions& options, const Launch& launch);
  /// Messages that progress together.
  OperationPtr exchange(std::span<const Message> messages, const CallOptions& options);

  // Memory that NCCL maps on all ranks; see Window.
  /// Of this rank. Throws kUnavailable: this NCCL has no windows.
  void* allocate_for_window(std::size_t bytes);
  /// Collective. nullptr: registration does nothing in this NCCL.
  abi::Window register_window(void* memory, std::size_t bytes, double timeout_s);
  /// nullptr: it is not mapped here.
  void* peer_address(abi::Window window, int rank);
  /// Nobody uses them any more; `window` may be nullptr. Waits for nothing: they go with the next registration, or the
  /// communicator.
  void retire_window(abi::Window window, void* memory);

  /// Empty, or what NCCL or the device says has gone wrong behind calls that had succeeded. Never waits long.
  std::string error();
  /// What is under way, oldest first.
  std::vector<OperationPtr> unfinished();
  /// End all calls under way and refuse later ones; kernels of the group do nothing any more. May take a while.
  void abort();
  bool aborted() const { return ended_->load(std::memory_order_acquire); }
  /// Wait until nothing is under way, then leave. False if `timeout_s` passes before; then it is aborted.
  bool close(double timeout_s);

 private:
  using Body = std::function<abi::Result(abi::Comm*, driver::abi::Stream)>;

  /// Where the last call went.
  struct Latest {
    OperationPtr operation;
    driver::abi::Stream stream = nullptr;
    std::uint64_t capture = 0;  // of a graph; 0: none
    bool by_kernel = false;
  };

  /// A call that has been logged, with what the log calls it.
  OperationPtr enqueue(const Call& call, std::uint64_t seq, const CallOptions& options, const Body& body);
  /// `put` the operation on the stream where `options` want it.
  OperationPtr enqueue_on_stream(const Call& call, std::uint64_t seq, const CallOptions& options,
                                 const std::function<void(const Operation&, driver::abi::Stream)>& put);
  void check_not_aborted(const Call& call) const;
  /// Run `call` on the communicator and wait until NCCL has done its part. Throws if that fails, or takes too long, or
  /// the communicator has been aborted.
  void invoke(const std::string& name, const Deadline& deadline, const std::function<abi::Result(abi::Comm*)>& call);
  /// Until `comm` (of this communicator or its child) is no longer in progress.
  void settle(const std::string& name, abi::Result result, const Deadline& deadline, abi::Comm* const& comm);
  /// Give back what was retired. While nothing else is called here.
  void drop_retired_windows();
  /// `call` in NCCL's terms.
  abi::Result put(const Call& call, const Operands& operands, int max_ctas, abi::Comm* comm,
                  driver::abi::Stream stream) const;
  /// What `add` enqueues, as one group. The first result that is bad, or in progress.
  abi::Result grouped(const std::function<abi::Result()>& add) const;

  std::shared_ptr<const Library> library_;
  std::shared_ptr<const Device> device_;
  int rank_;
  int world_size_;
  InterruptCheck interrupt_;
  CallLog log_;
  KernelGroups kernels_;
  std::shared_ptr<std::atomic<bool>> ended_ = std::make_shared<std::atomic<bool>>(false);

  std::mutex issuing_;        // one call at a time, from its log entry to its end event
  std::timed_mutex calling_;  // one thread at a time in NCCL with comm_
  abi::Comm* comm_ = nullptr;
  abi::Comm* child_ = nullptr;  // of the split under way
  std::unique_ptr<driver::Stream> stream_;
  std::unique_ptr<driver::Event> entry_;
  Latest latest_;
  std::mutex flying_;
  std::deque<OperationPtr> in_flight_;
  abi::Window opening_ = nullptr;  // of the registration under way
  std::mutex retiring_;
  std::vector<std::pair<abi::Window, void*>> retired_;
};

}  // namespace pycomm::nccl
