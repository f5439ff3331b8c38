// What this rank has called, for the watchdog to compare with what the others have: NCCL itself compares nothing, and
// calls that differ hang or mix up their data. A call is logged before it is enqueued.
//
// Collectives form a chain: the hash after call k covers calls 1 … k, so ranks that agree on one number agree on all
// calls before it. Messages have their own numbers, per peer and direction, since only two ranks take part.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "pycomm/call.hpp"

namespace pycomm::nccl {

/// A message as one of its two ranks called it: its number between the two, from 1, and kSend or kRecv.
struct LoggedMessage {
  std::uint64_t number;
  Call call;
};
static_assert(sizeof(LoggedMessage) == 32);

class CallLog {
 public:
  /// Returns the call's number in the group, from 1. Thread-safe, as are all below.
  std::uint64_t add(const Call& call);
  void add_message(const Call& call);

  std::uint64_t num_calls() const;
  /// The hash after call `number`; 0 and those from the oldest kept to the last are known.
  std::uint64_t hash(std::uint64_t number) const;
  Call call(std::uint64_t number) const;
  /// The latest, collective or message.
  Call latest() const;
  /// All ranks agree up to `number`: only its hash is needed any more.
  void confirm(std::uint64_t number);
  std::uint64_t num_confirmed() const;

  /// Messages that have not been taken, `most` at a time, in their order.
  std::vector<LoggedMessage> take_messages(std::size_t most);
  std::size_t num_messages() const;

 private:
  struct Entry {
    Call call;
    std::uint64_t hash;
  };

  mutable std::mutex mutex_;
  std::uint64_t confirmed_ = 0;
  std::uint64_t confirmed_hash_ = 0;
  std::deque<Entry> calls_;  // from confirmed_ + 1
  Call latest_;
  std::map<std::pair<int, bool>, std::uint64_t> num_messages_;  // by peer and whether it is a send
  std::deque<LoggedMessage> messages_;
};

}  // namespace pycomm::nccl
