#include "nccl/call_log.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace pycomm::nccl {

namespace {

/// FNV-1a over the call's bytes, which have no padding.
std::uint64_t extended(std::uint64_t hash, const Call& call) {
  unsigned char bytes[sizeof(Call)];
  std::memcpy(bytes, &call, sizeof(call));
  hash ^= 0xcbf29ce484222325;
  for (const unsigned char byte : bytes) hash = (hash ^ byte) * 0x100000001b3;
  return hash;
}

}  // namespace

std::uint64_t CallLog::add(const Call& call) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t before = calls_.empty() ? confirmed_hash_ : calls_.back().hash;
  calls_.push_back({call, extended(before, call)});
  latest_ = call;
  return confirmed_ + calls_.size();
}

void CallLog::add_message(const Call& call) {
  const std::lock_guard lock(mutex_);
  messages_.push_back({++num_messages_[{call.root, call.kind == OpKind::kSend}], call});
  latest_ = call;
}

std::uint64_t CallLog::num_calls() const {
  const std::lock_guard lock(mutex_);
  return confirmed_ + calls_.size();
}

std::uint64_t CallLog::hash(std::uint64_t number) const {
  const std::lock_guard lock(mutex_);
  return number == confirmed_ ? confirmed_hash_ : calls_.at(number - confirmed_ - 1).hash;
}

Call CallLog::call(std::uint64_t number) const {
  const std::lock_guard lock(mutex_);
  return calls_.at(number - confirmed_ - 1).call;
}

Call CallLog::latest() const {
  const std::lock_guard lock(mutex_);
  return latest_;
}

void CallLog::confirm(std::uint64_t number) {
  const std::lock_guard lock(mutex_);
  if (number == confirmed_) return;
  const auto count = static_cast<std::ptrdiff_t>(number - confirmed_);
  confirmed_hash_ = calls_.at(static_cast<std::size_t>(count - 1)).hash;
  calls_.erase(calls_.begin(), calls_.begin() + count);
  confirmed_ = number;
}

std::uint64_t CallLog::num_confirmed() const {
  const std::lock_guard lock(mutex_);
  return confirmed_;
}

std::vector<LoggedMessage> CallLog::take_messages(std::size_t most) {
  const std::lock_guard lock(mutex_);
  const auto count = static_cast<std::ptrdiff_t>(std::min(most, messages_.size()));
  std::vector<LoggedMessage> taken(messages_.begin(), messages_.begin() + count);
  messages_.erase(messages_.begin(), messages_.begin() + count);
  return taken;
}

std::size_t CallLog::num_messages() const {
  const std::lock_guard lock(mutex_);
  return messages_.size();
}

}  // namespace pycomm::nccl
