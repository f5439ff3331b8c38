// Where finished operations are announced, for the one thread of a process that serves the futures of all of them.
//
// Threads that finish operations put a token and go on: they run no callback, so they never need Python's lock. The
// queue's mutex orders what a finished operation wrote before the token's taker, beside the mutex of its Work.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>

namespace pycomm::host {

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

}  // namespace pycomm::host
