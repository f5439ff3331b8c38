// Asynchronous operations: a queue and one thread per communicator, started on first use, that runs them in issue
// order. The thread never takes the GIL and blocks all signals. It copies the caller's floating-point environment
// (rounding and flush-to-zero modes), so that a sum has the same bits sync and async.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "host/bootstrap.hpp"
#include "host/completions.hpp"
#include "host/groups.hpp"
#include "host/inside.hpp"

namespace pycomm::host {

/// Wait for `ready` until the deadline; false if it passed. Between slices `check` runs, without the lock, and may
/// throw.
template <class Check, class Ready>
bool wait_in_slices(std::unique_lock<std::mutex>& lock, std::condition_variable& changed, const Deadline& deadline,
                    const Check& check, const Ready& ready) {
  constexpr auto kSlice = std::chrono::milliseconds(50);
  std::optional<ShownWait> shown;
  while (!ready()) {
    if (changed.wait_for(lock, std::min<Deadline::Clock::duration>(kSlice, deadline.left()), ready)) break;
    if (deadline.expired()) return false;
    lock.unlock();  // an interrupt check takes the GIL
    if (!shown) shown.emplace(ShownWait::Kind::kForWork, Inside::innermost_owner());
    shown->show();
    check();
    lock.lock();
  }
  return true;
}

inline auto interrupting(InterruptCheck interrupt) {
  return [interrupt] {
    if (interrupt != nullptr) interrupt();
  };
}

/// Counts a scope while it lasts.
class Counted {
 public:
  explicit Counted(std::atomic<int>& number) : number_(number) { ++number_; }
  Counted(const Counted&) = delete;  // marks one scope
  Counted& operator=(const Counted&) = delete;
  ~Counted() { --number_; }

 private:
  std::atomic<int>& number_;
};

/// The handle of one asynchronous operation, whoever runs it: threads of this library, or code in Python. `owner`: as
/// Inside's.
class Work {
 public:
  explicit Work(const void* owner = nullptr) : owner_(owner) {}

  bool done() const;
  /// Whether somebody waits for it, or is told of its end.
  bool is_awaited() const;
  /// Return when the operation is over; rethrow what it threw. Throws kWaitExpired after `timeout_s`; it goes on then.
  void wait(std::optional<double> timeout_s, InterruptCheck interrupt);
  /// `token` is put into `completions` when the operation is over, at once if it is.
  void announce(std::shared_ptr<Completions> completions, std::uint64_t token);
  /// `source`: where a received message came from. The first end counts.
  void finish(std::exception_ptr error, int source = -1);
  /// `whole` ends, well, when all of `parts` have ended, well or not; at once if there are none.
  static void finish_after(std::shared_ptr<Work> whole, const std::vector<std::shared_ptr<Work>>& parts);
  /// After the end of a receive: the rank that sent.
  int source() const;

  /// A wait for an operation that is made of several.
  class LongWait {
   public:
    explicit LongWait(std::shared_ptr<Work> work)
        : work_(std::move(work)), counted_(work_->num_waiting_), shown_(ShownWait::Kind::kForWork, work_->owner_) {}

   private:
    std::shared_ptr<Work> work_;
    Counted counted_;
    ShownWait shown_;
  };

 private:
  /// Call `listener` when the operation is over, at once if it is; in the thread that ends it, which shall not wait.
  void when_over(std::function<void()> listener);

  const void* owner_;
  mutable std::mutex mutex_;
  std::condition_variable finished_;
  bool done_ = false;
  std::atomic<int> num_waiting_ = 0;
  std::exception_ptr error_;
  int source_ = -1;
  std::vector<std::function<void()>> listeners_;
};

class Progress {
 public:
  /// `owner`: as Inside's.
  explicit Progress(const void* owner) : owner_(owner) {}
  Progress(const Progress&) = delete;  // its thread holds its address
  Progress& operator=(const Progress&) = delete;
  ~Progress() { stop(); }

  std::shared_ptr<Work> submit(std::function<void()> operation);
  /// True while an operation is queued or running.
  bool busy() const;
  /// Return once nothing is queued or running; false if `timeout_s` passes before.
  bool drain(double timeout_s, InterruptCheck interrupt);
  /// Finish what is queued and join the thread. Idempotent.
  void stop();

 private:
  struct Task {
    std::function<void()> operation;
    std::shared_ptr<Work> work;
    std::fenv_t floating_point;
  };

  void loop();

  const void* owner_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable emptied_;
  std::deque<Task> tasks_;  // the front one is running
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace pycomm::host
