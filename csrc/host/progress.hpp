// Asynchronous operations: a queue and one thread per communicator, started on first use, that runs them in issue
// order. The thread never takes the GIL and blocks all signals. It copies the caller's floating-point environment
// (rounding and flush-to-zero modes), so that a sum has the same bits sync and async.
#pragma once

#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "pycomm/inside.hpp"
#include "pycomm/work.hpp"

namespace pycomm::host {

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
