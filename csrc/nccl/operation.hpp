// A call that has been enqueued: where its end is seen, and until when it may take.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

#include "nccl/driver.hpp"
#include "pycomm/call.hpp"
#include "pycomm/work.hpp"

namespace pycomm::nccl {

/// Waits that get longer: the first few give up the core only, the last ones sleep a millisecond.
class Backoff {
 public:
  void pause() {
    if (++num_ <= kYields) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::min<std::chrono::microseconds>(kLongest, kFirst * (num_ - kYields)));
    }
  }

 private:
  static constexpr int kYields = 50;
  static constexpr std::chrono::microseconds kFirst{5};
  static constexpr std::chrono::microseconds kLongest{1000};
  int num_ = 0;
};

/// Its Work's end is told by whoever looks at the device: Communicator::unfinished, which the watchdog calls.
class Operation final : public Work {
 public:
  /// `ended`: set when the communicator has failed; its operations count as over then.
  Operation(const driver::Context& context, const Call& call, std::uint64_t seq, double timeout_s,
            std::shared_ptr<const std::atomic<bool>> ended)
      : call_(call),
        seq_(seq),
        deadline_(Deadline::after(timeout_s)),
        ended_(std::move(ended)),
        event_(context.driver()) {}

  const Call& call() const { return call_; }
  std::uint64_t seq() const { return seq_; }  // of a message: 0
  const Deadline& deadline() const { return deadline_; }

  /// All of it lies on `stream`. `capturing`: into a graph, whose events nobody may look at.
  void enqueued(driver::abi::Stream stream, bool capturing) {
    event_.record(stream);
    if (capturing) passed_.store(true, std::memory_order_relaxed);
  }
  /// What `stream` does from now on comes after this operation. Does not wait.
  void make_wait(driver::abi::Stream stream) const { event_.make_wait(stream); }
  /// Whether it is over on the device.
  bool passed() const {
    if (!passed_.load(std::memory_order_acquire) && event_.passed()) passed_.store(true, std::memory_order_release);
    return passed_.load(std::memory_order_acquire);
  }
  /// Passed, or the communicator has failed.
  bool done() const override { return ended_->load(std::memory_order_acquire) || passed(); }
  /// Of a message: the other rank.
  int source() const override { return is_message() ? call_.root : -1; }
  bool is_message() const { return call_.kind == OpKind::kSend || call_.kind == OpKind::kRecv; }
  /// Block this thread until it is over; false if `timeout_s` passes before.
  bool reach(double timeout_s, InterruptCheck interrupt) const;

 private:
  Call call_;
  std::uint64_t seq_;
  Deadline deadline_;
  std::shared_ptr<const std::atomic<bool>> ended_;
  driver::Event event_;
  mutable std::atomic<bool> passed_ = false;
};

}  // namespace pycomm::nccl
