// strict=True: find calls that wait for each other, and say which, instead of waiting for the deadline.
//
// A rank that has waited for a while in a synchronous call shows, in the control segment of the communicator that
// init() made, what it is in and whom it needs; all communicators split from that one look there, so that a cycle may
// lead through several. It then looks at what the others show. Ranks that need each other, or such ranks, in calls that
// none of them can leave first, are deadlocked. The first to be sure says so to all of them, and each raises.
//
// Being sure. A rank that is shown waiting can only act in the call that it is in: a rank that issues calls on several
// threads, or has asynchronous operations under way, is never counted as waiting. So the ranks found are deadlocked for
// certain if there was a time when each of them still needed the ones that it says it needs. They write at different
// times, hence two looks with a window between: in it no rank left its call or changed what it needs (`version`), no
// message of theirs moved (`moves`), and each has looked twice whether it may go on (`looks`), once from the window's
// start. A message or flag that could free one of them had been sent before, and would have been seen then.
// This is the detection of communication deadlocks of Chandy, Misra and Haas (1983), with shared memory for the probes.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "host/control.hpp"

namespace pycomm::host {

struct Membership;

/// What a waiting call needs: something from each of `all`, and from at least one of `any` unless that is empty.
struct Needs {
  std::vector<int> all;
  std::vector<int> any;

  bool operator==(const Needs&) const = default;
};

/// One process's view of all ranks of an init(); shared by the communicators that are split from it. Thread-safe.
class WaitGraph {
 public:
  explicit WaitGraph(const Membership& world);
  WaitGraph(const WaitGraph&) = delete;  // one a process and init()
  WaitGraph& operator=(const WaitGraph&) = delete;

  /// The ranks, in the world, of the processes of a communicator split from it.
  std::vector<int> ranks_of(const std::vector<std::uint64_t>& tokens) const;
  /// The calling thread issues a call.
  void issue();
  /// An asynchronous operation is under way as long as the result lives.
  std::shared_ptr<void> start_async();
  /// A part of some message has been sent, received or matched.
  void move() { add_flag(mine().moves, std::uint64_t{1}); }

 private:
  friend class WatchedWait;

  struct Shown {  // of one rank, at one time
    std::uint64_t version = 0;
    std::uint64_t moves = 0;
    std::uint64_t looks = 0;
    bool waits = false;
    Needs needs;

    bool same(const Shown& other) const { return version == other.version && moves == other.moves; }
  };

  WaitRecord& record(int rank) const { return control_.flags(rank).waiting; }
  WaitRecord& mine() const { return record(rank_); }
  void show(const Needs& needs) const;
  Shown read(int rank) const;
  std::vector<Shown> read_all() const;
  /// The largest set of ranks none of which can go on before another of the set does.
  static std::vector<bool> deadlocked(const std::vector<Shown>& shown);
  std::string describe_cycle(const std::vector<Shown>& shown, const std::vector<bool>& stuck) const;

  Control control_;
  int rank_;
  int world_size_;
  std::vector<std::uint64_t> tokens_;
  std::atomic<std::thread::id> issuer_{};
  std::atomic<bool> several_issuers_ = false;
};

/// One wait of a synchronous call, from when it has become a long one.
class WatchedWait {
 public:
  /// `ranks`: of the call's group, in the world. `what`: the call, for messages.
  WatchedWait(WaitGraph& graph, const std::vector<int>& ranks, const std::string& what);
  WatchedWait(const WatchedWait&) = delete;  // marks one scope
  WatchedWait& operator=(const WatchedWait&) = delete;
  ~WatchedWait();

  /// After each look whether the call may go on, in which it needed `needs` (ranks of the group). Throws kDeadlock.
  void look(const Needs& needs);

 private:
  void obey_verdicts() const;
  void judge(const std::vector<WaitGraph::Shown>& shown, const std::vector<bool>& stuck) const;

  WaitGraph& graph_;
  const std::vector<int>& ranks_;
  std::optional<Needs> shown_;
  std::vector<WaitGraph::Shown> before_;  // the window's start
  std::vector<bool> stuck_before_;
};

}  // namespace pycomm::host
