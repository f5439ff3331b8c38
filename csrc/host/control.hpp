// The control segment of a communicator: per rank, its flags, its two call slots and its two staging buffers. Rank
// areas lie one after the other; everything starts as zeros.
//
//   area of rank r:  RankFlags | CallSlot 0 | staging 0 | CallSlot 1 | staging 1 | channel from rank 0 | from rank 1 |
//   …
//
// A call with sequence number s uses slot s % 2 and, for its slice k, staging (s + k) % 2. Two suffice: a rank
// writes into slot s % 2 for call s only after it has seen every peer enter call s - 1, and a peer enters s - 1 only
// when it is done with s - 2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "host/channel.hpp"
#include "host/segment.hpp"
#include "pycomm/call.hpp"
#include "pycomm/shown_wait.hpp"
#include "pycomm/signal.hpp"

namespace pycomm::host {

enum class RankState : std::uint32_t { kAlive = 0, kClosed = 1, kFailed = 2 };

inline constexpr int kMaxRanks = 240;  // descriptors in one SCM_RIGHTS message are limited to 253
inline constexpr std::size_t kRankWords = (kMaxRanks + 63) / 64;  // of a bit set of ranks
inline constexpr std::size_t kReasonBytes = 448;
inline constexpr std::size_t kActivityBytes = 224;

/// Put as much of a UTF-8 text as fits, whole characters and a zero behind. Peers read it once they have seen a flag
/// that is stored after it.
template <std::size_t kBytes>
void put_text(char (&to)[kBytes], std::string_view text) {
  std::size_t length = std::min(text.size(), kBytes - 1);
  const auto continues = [&](std::size_t i) { return (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80; };
  if (length < text.size()) {
    while (length != 0 && continues(length)) --length;
  }
  std::memcpy(to, text.data(), length);
  to[length] = '\0';
}
/// What a peer has put.
template <std::size_t kBytes>
std::string text_in(const char (&from)[kBytes]) {
  return {from, ::strnlen(from, kBytes)};
}

/// What wakes a rank. One for collectives and one for messages, since different threads may sleep on them.
struct alignas(kCacheLine) Bell {
  std::uint32_t doorbell;  // futex word: a change wakes whoever sleeps
  std::uint32_t sleepers;  // threads of the rank that sleep on it
};

/// strict: the synchronous call that a rank waits in, and whom it needs (wait_graph.hpp).
struct alignas(kCacheLine) WaitRecord {
  std::uint64_t version;  // odd: the rank waits, and the two sets and `what` hold
  std::uint64_t moves;    // grows with each part of a message that the rank sends, receives or matches
  std::uint64_t looks;    // grows when the rank looks whether it may go on
  std::uint32_t num_async;
  std::uint64_t all[kRankWords];
  std::uint64_t any[kRankWords];
  char what[224];
};

/// strict: what a rank found out about waits of others and its own.
struct alignas(kCacheLine) Verdict {
  std::uint64_t number;              // written last
  std::uint64_t version[kMaxRanks];  // of the wait that will never end, by rank; 0: none
  char cycle[1024];
};

/// Whether a process waits, and for whom in the end; the same in all its groups (groups.hpp).
struct Waits {
  std::uint64_t written_ns = 0;  // when, on the monotonic clock
  std::uint32_t is_waiting = 0;
  std::uint32_t num_roots = 0;
  char text[kActivityBytes] = {};  // what the first of the roots is in
  RootProcess roots[kMaxRanks] = {};
};
static_assert(sizeof(Waits) % sizeof(std::uint64_t) == 0);

/// The same in shared memory. Readers look at the version before and after.
struct alignas(kCacheLine) WaitsRecord {
  std::uint64_t version;  // odd while the rest is being written
  std::uint64_t words[sizeof(Waits) / sizeof(std::uint64_t)];

  void write(const Waits& waits);
  /// False if it is being written, by a process that has been stopped in the middle of that.
  bool read(Waits& waits) const;
};

/// What a rank shows to its peers beside its calls. One cache line per writer-reader relation.
struct RankFlags {
  alignas(kCacheLine) std::uint64_t step;       // phases inside calls: call seq << kStepBits | phase
  alignas(kCacheLine) std::uint64_t completed;  // the last call that this rank is done with, for error messages
  Bell calls;
  Bell messages;
  alignas(kCacheLine) std::uint32_t state;  // RankState, written after the root and the reason
  std::uint32_t aborted;                    // 1: comm.abort() here; every rank shall stop
  std::uint32_t num_roots;                  // processes at the root of this rank's end, if that is not the rank itself,
  std::uint64_t roots[kMaxRanks];           // by their tokens. kAlive: of a failure in another group of its process,
                                            // since which it has called nothing here; they count if it ends now
  std::uint32_t order[2][kMaxRanks];        // strict: issue numbers of the call in slot s % 2, by peer
  char reason[kReasonBytes];                // why it ended, or what happened to the roots; zero-terminated
  std::uint32_t is_active;                  // 1: `activity` holds
  char activity[kActivityBytes];            // what the process is in, in whichever group; for error messages
  WaitsRecord waits;
  WaitRecord waiting;
  Verdict verdict;
};
inline constexpr int kStepBits = 24;

/// One call's descriptor; tiny payloads ride in the same cache line, larger ones in the staging buffer behind it.
struct alignas(kCacheLine) CallSlot {
  std::uint64_t seq;  // the flag: written last
  Call call;
  Locations locations;
  std::byte payload[kCacheLine - sizeof(std::uint64_t) - sizeof(Call) - sizeof(Locations)];
};
static_assert(sizeof(CallSlot) == kCacheLine);

/// Sizes and thresholds, decided by rank 0 and sent to all, since the choice of an algorithm must be the same
/// everywhere.
struct Tuning {
  std::uint64_t slice_bytes = 0;     // staging buffer
  std::uint64_t one_shot_bytes = 0;  // up to this total (bytes * ranks) a message goes through the slots in one step
  std::uint64_t cached_bytes = 0;    // calls whose tensors, of all ranks together, take more are copied past the caches
  std::uint64_t strict = 0;          // 1: calls carry their issue order (issue_order.hpp)
  ChannelSizes channel;
};
/// From the sizes of this machine's caches and the number of ranks.
Tuning default_tuning(int world_size);

using Thresholds = std::map<std::string, std::uint64_t>;
/// slice_bytes, one_shot_bytes, cached_bytes, eager_bytes and stream_bytes.
Thresholds thresholds_of(const Tuning& tuning);
/// The default with other values for some of them. Throws std::invalid_argument for a name or a value that cannot be.
Tuning tuning_with(int world_size, const Thresholds& thresholds);
/// Why memory cannot be laid out by a tuning that somebody else sent; empty: it can.
std::string unusable(const Tuning& tuning);

class Control {
 public:
  Control() = default;
  Control(Segment segment, int world_size, const Tuning& tuning);
  static std::size_t bytes_for(int world_size, const Tuning& tuning);

  const Segment& segment() const { return *segment_; }
  RankFlags& flags(int rank) const { return *reinterpret_cast<RankFlags*>(area(rank)); }
  CallSlot& slot(int rank, std::uint64_t seq) const {
    return *reinterpret_cast<CallSlot*>(area(rank) + sizeof(RankFlags) + (seq % 2) * slot_stride_);
  }
  std::byte* staging(int rank, std::uint64_t index) const {
    return reinterpret_cast<std::byte*>(&slot(rank, index)) + sizeof(CallSlot);
  }
  Channel channel(int source, int destination) const {
    return Channel(area(destination) + channels_offset_ + static_cast<std::size_t>(source) * channel_sizes_.bytes(),
                   channel_sizes_);
  }

 private:
  std::byte* area(int rank) const { return segment_->data() + static_cast<std::size_t>(rank) * area_stride_; }

  std::shared_ptr<Segment> segment_;  // a WaitGraph may need it for longer than its communicator
  std::size_t slot_stride_ = 0;
  std::size_t channels_offset_ = 0;
  ChannelSizes channel_sizes_;
  std::size_t area_stride_ = 0;
};

}  // namespace pycomm::host
