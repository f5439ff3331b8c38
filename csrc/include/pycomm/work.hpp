// Work: the handle of everything that is under way, whoever runs it: a thread of this library, a GPU, or code in
// Python. Its end is told to those who wait, and announced to Completions, where one thread of a process serves the
// futures of all operations.
//
// Threads that end operations put a token there and go on: they run no callback, so they never need Python's lock. The
// queue's mutex orders what a finished operation wrote before the token's taker, beside the mutex of its Work.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "pycomm/deadline.hpp"
#include "pycomm/inside.hpp"
#include "pycomm/shown_wait.hpp"

namespace pycomm {

/// Wait for `ready` until the deadline; false if it passed. Between slices `check` runs, without the lock, and may
/// throw. `owner`: whose operations end it, as ShownWait's.
template <class Check, class Ready>
bool wait_in_slices(std::unique_lock<std::mutex>& lock, std::condition_variable& changed, const Deadline& deadline,
                    const Check& check, const Ready& ready, const void* owner = Inside::innermost_owner()) {
  constexpr auto kSlice = std::chrono::milliseconds(50);
  std::optional<ShownWait> shown;
  while (!ready()) {
    if (changed.wait_for(lock, std::min<Deadline::Clock::duration>(kSlice, deadline.left()), ready)) break;
    if (deadline.expired()) return false;
    lock.unlock();  // an interrupt check takes the GIL
    if (!shown) shown.emplace(ShownWait::Kind::kForWork, owner);
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

class Completions {
 public:
  Completions() = default;
  Completions(const Completions&) = delete;  // a thread waits at its address
  Completions& operator=(const Completions&) = delete;

  void put(std::uint64_t token);
  /// The next token; nothing once it is closed. Throws kWaitExpired after `timeout_s`, if that is given.
  std::optional<std::uint64_t> take(std::optional<double> timeout_s);
  /// Wake the taker for good. Tokens that are left are dropped.
  void close();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::uint64_t> tokens_;
  bool closed_ = false;
};

class Work {
 public:
  /// `owner`: as Inside's. `text`: what a wait for it is inside of; `is_collective`: of its communicator's turn.
  explicit Work(const void* owner = nullptr, std::string text = "a wait for asynchronous operations",
                bool is_collective = false);
  Work(const Work&) = delete;  // others wait at its address
  Work& operator=(const Work&) = delete;
  virtual ~Work() = default;

  virtual bool done() const;
  /// Whether somebody waits for it, or is told of its end.
  bool is_awaited() const;
  /// Return when the operation is over; rethrow what it threw. Throws kWaitExpired after `timeout_s`; it goes on then.
  virtual void wait(std::optional<double> timeout_s, InterruptCheck interrupt);
  /// After the end of a receive: the rank that sent.
  virtual int source() const;

  /// `token` is put into `completions` when the operation is over, at once if it is.
  void announce(std::shared_ptr<Completions> completions, std::uint64_t token);
  /// `source`: where a received message came from. The first end counts.
  void finish(std::exception_ptr error, int source = -1);
  /// `whole` ends, well, when all of `parts` have ended, well or not; at once if there are none.
  static void finish_after(const std::shared_ptr<Work>& whole, const std::vector<std::shared_ptr<Work>>& parts);

  /// What the operation reads and writes stays until release(). Under Python's lock, both of them.
  void keep(std::shared_ptr<void> what) { kept_ = std::move(what); }
  void release() { kept_.reset(); }

 protected:
  class Awaited;
  const void* owner() const { return owner_; }
  static std::string describe(const void* work) { return static_cast<const Work*>(work)->text_; }
  /// Whose operations end it, as ShownWait's owner.
  virtual const void* ended_by() const { return owner_; }
  /// Called every 50 ms while a caller waits for it, and at the end of such a wait.
  virtual void look() {}
  virtual void rest() {}

 private:
  /// Call `listener` when the operation is over, at once if it is; in the thread that ends it, which shall not wait.
  void when_over(std::function<void()> listener);

  const void* owner_;
  std::string text_;
  bool is_collective_;
  mutable std::mutex mutex_;
  std::condition_variable finished_;
  bool done_ = false;
  std::atomic<int> num_waiting_ = 0;
  std::exception_ptr error_;
  int source_ = -1;
  std::vector<std::function<void()>> listeners_;
  std::shared_ptr<void> kept_;
};

}  // namespace pycomm
