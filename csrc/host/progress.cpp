#include "host/progress.hpp"

#include <pthread.h>

#include <csignal>
#include <exception>
#include <utility>

#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

std::string describe_work(const void*) { return "a wait for asynchronous operations"; }

}  // namespace

std::shared_ptr<Work> Progress::submit(std::function<void()> operation) {
  Task task{.operation = std::move(operation), .work = std::make_shared<Work>(owner_), .floating_point = {}};
  std::fegetenv(&task.floating_point);
  auto work = task.work;
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) throw Error(ErrorKind::kGeneral, "the communicator is closed");
    if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
    tasks_.push_back(std::move(task));
  }
  changed_.notify_all();
  return work;
}

bool Progress::busy() const {
  const std::lock_guard lock(mutex_);
  return !tasks_.empty();
}

bool Progress::drain(double timeout_s, InterruptCheck interrupt) {
  std::unique_lock lock(mutex_);
  const Inside inside(owner_, Inside::Kind::kOther, &describe_work, nullptr);
  return wait_in_slices(lock, emptied_, Deadline::after(timeout_s), interrupting(interrupt),
                        [this] { return tasks_.empty(); });
}

void Progress::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Progress::loop() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  pthread_setname_np(pthread_self(), "pycomm-progress");
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    Task& task = tasks_.front();  // a deque's elements stay where they are while others are added
    lock.unlock();
    std::exception_ptr error;
    std::fesetenv(&task.floating_point);
    try {
      task.operation();
    } catch (...) {  // whatever it is, wait() rethrows it on the caller's thread
      error = std::current_exception();
    }
    const std::shared_ptr<Work> work = std::move(task.work);
    lock.lock();
    tasks_.pop_front();
    const bool emptied = tasks_.empty();
    lock.unlock();
    work->finish(error);
    if (emptied) emptied_.notify_all();
    lock.lock();
  }
}

}  // namespace pycomm::host
