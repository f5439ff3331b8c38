#include "host/completions.hpp"

#include <chrono>
#include <string>

#include "pycomm/error.hpp"

namespace pycomm::host {

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

}  // namespace pycomm::host
