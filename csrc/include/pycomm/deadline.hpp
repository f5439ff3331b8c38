// A point in time after which no wait goes on.
#pragma once

#include <chrono>

namespace pycomm {

/// Runs Python's signal handlers during a wait; throws what they raise. nullptr: none.
using InterruptCheck = void (*)();

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  static Deadline after(double seconds) {
    constexpr double kLongest = 10.0 * 365 * 24 * 3600;  // keeps the sum inside the clock's range
    const double bounded = seconds < kLongest ? seconds : kLongest;
    return Deadline(seconds,
                    Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded)));
  }

  bool expired(Clock::time_point now = Clock::now()) const { return now >= when_; }
  /// Time left, never negative.
  Clock::duration left(Clock::time_point now = Clock::now()) const {
    return now < when_ ? when_ - now : Clock::duration::zero();
  }
  double timeout_s() const { return timeout_s_; }  // as it was asked for, for messages

 private:
  Deadline(double timeout_s, Clock::time_point when) : timeout_s_(timeout_s), when_(when) {}

  double timeout_s_;
  Clock::time_point when_;
};

}  // namespace pycomm
