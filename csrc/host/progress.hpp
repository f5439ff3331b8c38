// Asynchronous operations: a queue and one thread per communicator, started on first use, that runs them in issue
// order. The thread never takes the GIL and blocks all signals. It copies the caller's floating-point environment
// (rounding and flush-to-zero modes), so that a sum has the same bits sync and async.
#pragma once

#include <cfenv>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "host/bootstrap.hpp"

namespace pycomm::host {

/// The handle of one asynchronous operation.
class Work {
 public:
  bool done() const;
  /// Return when the operation is over; rethrow what it threw. Throws kWaitExpired after `timeout_s`; it goes on then.
  void wait(std::optional<double> timeout_s, InterruptCheck interrupt);
  void finish(std::exception_ptr error);

 private:
  mutable std::mutex mutex_;
  std::condition_variable finished_;
  bool done_ = false;
  std::exception_ptr error_;
};

class Progress {
 public:
  Progress() = default;
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

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable emptied_;
  std::deque<Task> tasks_;  // the front one is running
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace pycomm::host
