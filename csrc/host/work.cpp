#include "pycomm/work.hpp"

#include <atomic>
#include <limits>
#include <utility>

#include "pycomm/error.hpp"
#include "pycomm/inside.hpp"

namespace pycomm {

void Completions::put(std::uint64_t token) {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    tokens_.push_back(token);
  }
  changed_.notify_one();
}

std::optional<std::uint64_t> Completions::take(std::optional<double> timeout_s) {
  std::unique_lock lock(mutex_);
  const auto ready = [this] { return closed_ || !tokens_.empty(); };
  if (!timeout_s) {
    changed_.wait(lock, ready);
  } else if (!changed_.wait_for(lock, std::chrono::duration<double>(*timeout_s), ready)) {
    throw Error(ErrorKind::kWaitExpired, "take: nothing was over within " + std::to_string(*timeout_s) + " s");
  }
  if (closed_) return std::nullopt;
  const std::uint64_t token = tokens_.front();
  tokens_.pop_front();
  return token;
}

void Completions::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    tokens_.clear();
  }
  changed_.notify_all();
}

Work::Work(const void* owner, std::string text, bool is_collective)
    : owner_(owner), text_(std::move(text)), is_collective_(is_collective) {}

bool Work::done() const {
  const std::lock_guard lock(mutex_);
  return done_;
}

bool Work::is_awaited() const {
  const std::lock_guard lock(mutex_);
  return num_waiting_.load() != 0 || !listeners_.empty();
}

int Work::source() const {
  const std::lock_guard lock(mutex_);
  return source_;
}

/// A wait of a caller.
class Work::Awaited {
 public:
  explicit Awaited(Work& work) : work_(work), counted_(work.num_waiting_) {}
  Awaited(const Awaited&) = delete;  // marks one scope
  Awaited& operator=(const Awaited&) = delete;
  ~Awaited() {
    if (has_looked_) work_.rest();
  }

  void look() const {
    has_looked_ = true;
    work_.look();
  }

 private:
  Work& work_;
  Counted counted_;
  mutable bool has_looked_ = false;
};

void Work::wait(std::optional<double> timeout_s, InterruptCheck interrupt) {
  const Deadline deadline = Deadline::after(timeout_s.value_or(std::numeric_limits<double>::infinity()));
  const Awaited awaited(*this);  // what it does at the end needs no lock
  std::unique_lock lock(mutex_);
  const Inside inside(owner_, is_collective_ ? Inside::Kind::kCollective : Inside::Kind::kOther, &describe, this);
  const auto check = [&] {
    if (interrupt != nullptr) interrupt();
    awaited.look();
  };
  if (!wait_in_slices(lock, finished_, deadline, check, [this] { return done_; }, ended_by())) {
    throw Error(ErrorKind::kWaitExpired,
                "wait: the operation is not done after " + std::to_string(deadline.timeout_s()) + " s; it goes on");
  }
  if (error_ != nullptr) std::rethrow_exception(error_);
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

void Work::finish_after(const std::shared_ptr<Work>& whole, const std::vector<std::shared_ptr<Work>>& parts) {
  const auto left = std::make_shared<std::atomic<std::size_t>>(parts.size() + 1);
  const auto end_one = [whole = std::weak_ptr<Work>(whole), left] {  // nobody waits for what nobody has any more
    if (left->fetch_sub(1) != 1) return;
    if (const std::shared_ptr<Work> work = whole.lock()) work->finish(nullptr);
  };
  for (const std::shared_ptr<Work>& part : parts) part->when_over(end_one);
  end_one();
}

}  // namespace pycomm
