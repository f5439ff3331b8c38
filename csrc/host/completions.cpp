#include "host/completions.hpp"

namespace pycomm::host {

void Completions::put(std::uint64_t token) {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    tokens_.push_back(token);
  }
  changed_.notify_one();
}

std::optional<std::uint64_t> Completions::take() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return closed_ || !tokens_.empty(); });
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
