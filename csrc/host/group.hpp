// What a collective is written on: the ranks' slots, staging buffers and flags, and the matched entry of every call.
//
// A collective is one function `name(Group&, …)` that
//   1. builds its Call and enters it: `Entry entry(group, call, locations, prepare)`;
//   2. moves data in numbered phases: `group.signal(phase)` after writing, `group.wait(phase)` before reading;
//   3. returns; ~Entry marks the call as completed.
// Everything else (deadlines, lost peers, messages) is done here and in Waiter. Phases count from 1 within a call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>

#include "host/bootstrap.hpp"
#include "host/issue_order.hpp"
#include "host/symmetric_segments.hpp"
#include "host/waiter.hpp"
#include "pycomm/error.hpp"

namespace pycomm::host {

class Group {
 public:
  /// `graph`: strict, and split from a group: that one's.
  Group(std::string name, Membership members, std::shared_ptr<WaitGraph> graph = nullptr);
  Group(const Group&) = delete;  // peers hold its addresses
  Group& operator=(const Group&) = delete;
  ~Group();

  int rank() const { return members_.rank; }
  int world_size() const { return members_.world_size; }
  const std::string& name() const { return name_; }
  const Tuning& tuning() const { return members_.tuning; }
  Membership& members() { return members_; }
  const Membership& members() const { return members_; }
  SymmetricSegments& segments() { return segments_; }
  const Waiter& waiter() const { return waiter_; }
  /// strict: else nullptr.
  const std::shared_ptr<WaitGraph>& graph() const { return graph_; }
  /// Of a synchronous call.
  Watch watch() const { return {.graph = graph_.get(), .ranks = &world_ranks_}; }
  /// Whether a call whose tensors take `bytes` bytes, those of all ranks together, should copy past the caches
  /// (copy.hpp).
  bool around_caches(std::uint64_t bytes) const { return bytes > tuning().cached_bytes; }
  /// The same, of a message of `bytes` bytes, one at each rank.
  bool message_around_caches(std::uint64_t bytes) const {
    return around_caches(bytes * static_cast<std::uint64_t>(world_size()));
  }

  /// This rank's staging buffer for slice `k` of the running call; `rank`'s likewise.
  std::byte* staging(int rank, std::uint64_t k) const { return members_.control.staging(rank, seq_ + k); }
  /// Where `rank`'s input (or output) of the running call lies if it is symmetric, else nullptr.
  std::byte* symmetric_input(int rank) const;
  std::byte* symmetric_output(int rank) const;
  /// Where the payload of `rank`'s slot lies (`bytes` long, at most a staging buffer).
  std::byte* payload(int rank, std::size_t bytes) const;
  /// For `prepare` of an Entry: show `bytes` bytes to all.
  void put_payload(const void* data, std::size_t bytes) const {
    if (bytes != 0) std::memcpy(payload(rank(), bytes), data, bytes);
  }

  void signal(std::uint64_t phase);
  /// Wait until every rank (or `only` that one) has signalled `phase` of the running call.
  void wait(std::uint64_t phase, int only = kEveryRank) const;
  static constexpr int kEveryRank = -1;

  /// For waits of `call` that are not for flags, on ranks whose names are those of this group: they end and show as
  /// others do.
  Meeting meeting(const char* op, const Call& call) const;

  /// Show the peers that this rank's `flag`, an epoch in its symmetric memory, has reached `value`. What was written
  /// before is seen by whoever has waited for it. Neither matched nor numbered: no call.
  void post(std::uint64_t& flag, std::uint64_t value);
  /// Wait until the counterpart of `flag` has reached `value` on every rank (or `only` that one). Inside run().
  void wait_posted(const std::uint64_t& flag, std::uint64_t value, int only);

  /// Run one collective on the calling thread; `issue`: its numbers from next_issue() if strict, else empty. Refuses if
  /// the group has failed; a failure inside marks it as failed, for this rank and for its peers.
  template <class Body>
  void run(double timeout_s, InterruptCheck check, std::vector<std::uint32_t> issue, const Body& body) {
    const IssueGuard guard(*this, std::move(issue));
    check_usable();
    carry_on();
    deadline_ = Deadline::after(timeout_s);
    interrupt_ = check;
    try {
      body(*this);
    } catch (const Error& error) {
      if (poisons(error.kind)) fail(error);
      throw;
    } catch (const std::invalid_argument&) {
      throw;         // a wrong argument: nothing was sent
    } catch (...) {  // Ctrl-C between two flags: the ranks are out of step for good
      fail(Error(ErrorKind::kGeneral, "interrupted in " + describe(call_) + " #" + std::to_string(seq_)));
      throw;
    }
  }

  void abort(const std::string& reason);
  /// Whether some rank, this one included, has called abort.
  bool aborted() const;
  /// Show the peers that this rank leaves. Where `alone`, no call is running, so the sockets go, too. Idempotent.
  void close(bool alone);
  /// Throws if a call has failed for good, or the group is closed. Thread-safe.
  void check_usable() const;
  /// No further call can succeed; tells the peers. Thread-safe; the first cause stays.
  void fail(const Error& error);
  /// Whether an error leaves the ranks out of step.
  static bool poisons(ErrorKind kind) { return !in_step(kind) && kind != ErrorKind::kOutOfMemory; }
  /// This process has heard of a failure in another group: if it ends before it calls anything here, this is why.
  void note(const Root& root);
  /// At the start of a call: whatever was heard before, this rank goes on.
  void carry_on() {
    if (is_noted_.load(std::memory_order_relaxed)) forget_note();
  }
  /// What this process is in, for peers whose wait for it runs out; empty: nothing.
  void show_activity(const std::string& what);
  /// For whom this process waits.
  void show_waits(const Waits& waits) { members_.control.flags(rank()).waits.write(waits); }
  /// "barrier() #5 of group 'world'": the running call.
  std::string running() const;
  const Deadline& deadline() const { return deadline_; }
  InterruptCheck interrupt() const { return interrupt_; }
  void set_patient(bool patient) {
    waiter_.set_patient(patient);
    patient_ = patient;
  }

 private:
  friend class Entry;

  /// Holds the running call's issue numbers, and takes them back if not everyone entered it.
  class IssueGuard {
   public:
    IssueGuard(Group& group, std::vector<std::uint32_t> issue) : group_(group) {
      group.issue_ = std::move(issue);
      group.entered_ = false;
    }
    ~IssueGuard() {
      if (!group_.issue_.empty() && !group_.entered_) forget_issue(group_.members_.tokens);
    }
    IssueGuard(const IssueGuard&) = delete;  // marks one scope
    IssueGuard& operator=(const IssueGuard&) = delete;

   private:
    Group& group_;
  };

  /// Every rank ended the call in the same way, so that all can go on.
  static bool in_step(ErrorKind kind) { return kind == ErrorKind::kMismatch || kind == ErrorKind::kStrictOrder; }
  void show_end(RankState state, const std::string& reason, const std::vector<std::uint64_t>& roots,
                bool aborts = false);
  void show_root(const std::vector<std::uint64_t>& roots, const std::string& text);
  void forget_note();
  void begin(const Call& call, const Locations& locations);
  void enter();
  void check_match() const;
  void check_order() const;
  WaitContext context() const { return {name_, seq_, call_, deadline_, interrupt_, patient_ ? Watch{} : watch()}; }

  std::string name_;
  Membership members_;
  SymmetricSegments segments_;
  Waiter waiter_;
  std::shared_ptr<WaitGraph> graph_;
  std::vector<int> world_ranks_;  // of the graph, by rank
  bool patient_ = false;          // the running call is an asynchronous one
  Deadline deadline_ = Deadline::after(0);
  InterruptCheck interrupt_ = nullptr;
  Call call_;
  std::vector<std::uint32_t> issue_;  // strict: the running call's issue number for each peer, else empty
  bool entered_ = false;              // by all ranks
  std::uint64_t seq_ = 0;
  mutable std::mutex ending_;  // those below: collectives, messages and other groups may fail on different threads
  std::unique_ptr<Error> failure_;
  bool has_ended_ = false;  // the peers have been shown an end
  std::atomic<bool> is_noted_ = false;
  std::atomic<bool> unusable_ = false;
  bool closed_ = false;
};

/// The matched entry of a call. Construction runs `prepare` (which may fill this rank's payload or first staging
/// slice), shows the call to all peers, waits for theirs and throws kMismatch on every rank if they differ; no user's
/// tensor has been written then. When it returns, every peer has entered: its payload, locations and first staging
/// slice can be read.
class Entry {
 public:
  template <class Prepare>
  Entry(Group& group, const Call& call, const Locations& locations, const Prepare& prepare) : group_(group) {
    group.begin(call, locations);
    prepare();
    enter();
  }
  explicit Entry(Group& group, const Call& call) : Entry(group, call, {}, [] {}) {}
  ~Entry() { complete(); }
  Entry(const Entry&) = delete;  // marks one scope
  Entry& operator=(const Entry&) = delete;

 private:
  void enter();
  void complete() const;

  Group& group_;
};

}  // namespace pycomm::host
