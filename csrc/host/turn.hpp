// One call of a communicator at a time: a lock whose wait has a deadline, a check and Ctrl-C, as every wait has.
// Uncontended, taking it is one atomic exchange.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

#include "host/progress.hpp"

namespace pycomm::host {

class Turn {
 public:
  bool try_take() { return !taken_.exchange(true); }
  bool is_taken() const { return taken_.load(std::memory_order_relaxed); }

  /// Wait for the turn; false if the deadline passed. `check` runs about every 50 ms and may throw.
  template <class Check>
  bool take(const Deadline& deadline, const Check& check) {
    if (try_take()) return true;
    const Counted waiting(num_waiting_);
    std::unique_lock lock(mutex_);
    return wait_in_slices(lock, given_back_, deadline, check, [this] { return try_take(); });
  }

  void give_back() {
    // Both are sequentially consistent, so that either this sees who waits or that one sees that the turn is free.
    taken_.store(false);
    if (num_waiting_.load() == 0) return;
    const std::lock_guard lock(mutex_);
    given_back_.notify_one();
  }

  /// Gives the turn back at the end of a scope.
  class Holder {
   public:
    explicit Holder(Turn& turn) : turn_(turn) {}
    Holder(const Holder&) = delete;  // marks one scope
    Holder& operator=(const Holder&) = delete;
    ~Holder() { turn_.give_back(); }

   private:
    Turn& turn_;
  };

 private:
  std::atomic<bool> taken_ = false;
  std::atomic<int> num_waiting_ = 0;
  std::mutex mutex_;
  std::condition_variable given_back_;
};

}  // namespace pycomm::host
