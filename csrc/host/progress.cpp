#include "host/progress.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <limits>

#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

std::string describe_work(const void*) { return "a wait for asynchronous operations"; }

}  // namespace

bool Work::done() const {
  const std::lock_guard lock(mutex_);
  return done_;
}

bool Work::is_awaited() const {
  const std::lock_guard lock(mutex_);
  return num_waiting_.load() != 0 || !listeners_.empty();
}

void Work::when_over(std::function<void()> listener) {
  {
    const std::lock_guard lock(mutex_);
    if (!done_) {
      listeners_.push_back(std::move(listener));
      return;
    }
  }
  listener();
}

void Work::announce(std::shared_ptr<Completions> completions, std::uint64_t token) {
  when_over([completions = std::move(completions), token] { completions->put(token); });
}

void Work::finish_after(std::shared_ptr<Work> whole, const std::vector<std::shared_ptr<Work>>& parts) {
  const auto left = std::make_shared<std::atomic<std::size_t>>(parts.size() + 1);
  const auto end_one = [whole = std::move(whole), left] {
    if (left->fetch_sub(1) == 1) whole->finish(nullptr);
  };
  for (const std::shared_ptr<Work>& part : parts) part->when_over(end_one);
  end_one();
}

void Work::finish(std::exception_ptr error, int source) {
  decltype(listeners_) listeners;
  {
    const std::lock_guard lock(mutex_);
    if (done_) return;
    done_ = true;
    source_ = source;
    error_ = std::move(error);
    listeners.swap(listeners_);
  }
  finished_.notify_all();
  for (const auto& listener : listeners) listener();
}

int Work::source() const {
  const std::lock_guard lock(mutex_);
  return source_;
}

void Work::wait(std::optional<double> timeout_s, InterruptCheck interrupt) {
  const Deadline deadline = Deadline::after(timeout_s.value_or(std::numeric_limits<double>::infinity()));
  std::unique_lock lock(mutex_);
  const Inside inside(owner_, Inside::Kind::kOther, &describe_work, nullptr);
  const Counted counted(num_waiting_);
  if (!wait_in_slices(lock, finished_, deadline, interrupting(interrupt), [this] { return done_; })) {
    throw Error(ErrorKind::kWaitExpired,
                "wait: the operation is not done after " + std::to_string(deadline.timeout_s()) + " s; it goes on");
  }
  if (error_ != nullptr) std::rethrow_exception(error_);
}

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
