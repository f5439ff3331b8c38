// The one wait of the host transport: for flags of peers, with a deadline, an abort, liveness and Ctrl-C.
//
// It spins with pause for some microseconds (only while every rank can have a core), then yields, then sleeps on this
// rank's doorbell in slices of 50 ms. After each slice it looks at the peers it still waits for:
//   dead     its pidfd says so                        -> Error kPeerLost
//   left     closed its communicator                  -> Error kPeerLost, "exited normally"
//   failed   gave up on a call                        -> Error kPeerLost
//   aborted  any rank called abort(reason)            -> Error kPeerLost with the reason
//   late     after 30 s                               -> a warning on stderr that names it
//   expired  at the deadline                          -> Error kTimeout, naming who is at the root (groups.hpp) and
//   what
//                                                        that is in
//   waits for this rank, strict (wait_graph.hpp)      -> Error kDeadlock, naming the cycle
// A peer's flag is looked at once more after its end was seen: what it did before it left counts. A peer that ended
// because of others says so (RankFlags::roots), and the error names those.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "host/bootstrap.hpp"
#include "host/groups.hpp"
#include "host/wait_graph.hpp"
#include "pycomm/error.hpp"
#include "pycomm/inside.hpp"

namespace pycomm::host {

/// strict: where a synchronous call shows that it waits. Without a graph it does not.
struct Watch {
  WaitGraph* graph = nullptr;
  const std::vector<int>* ranks = nullptr;        // of the group, in the world
  const std::function<Needs()>* needs = nullptr;  // nullptr: all that are not ready
};

/// What a waiting rank is in, for messages.
struct WaitContext {
  std::string_view group;
  std::uint64_t seq;
  Call call;
  Deadline deadline;
  InterruptCheck interrupt;
  Watch watch;
  /// Whose process to look at for the roots of the wait; when it `expires`, those of this call alone. nullptr: of all
  /// that are not ready.
  const std::function<std::vector<int>(bool expires)>* misses = nullptr;
};

/// In the text of an error, before what the process at the root of the wait is in.
inline constexpr char kAtRoot[] = "; at the root: ";

/// "0.5 s".
std::string seconds(double value);
/// "barrier() #5 of group 'world'".
std::string where(const WaitContext& context);

class Waiter {
 public:
  /// `group`: its name, which lives as long. `bell`: what its sleeping threads are woken by, &RankFlags::calls or
  /// &RankFlags::messages.
  Waiter(const Membership& members, std::string_view group, Bell RankFlags::* bell);

  /// Return once ready(rank) holds for every rank. `ready` must be monotonic: once true it stays true.
  template <class Ready>
  void wait(const Ready& ready, const WaitContext& context) const {
    int next = 0;  // every rank before it is ready
    const auto advance = [&] {
      while (next < members_.world_size && ready(next)) ++next;
      return next == members_.world_size;
    };
    if (spin(advance)) return;
    using Advance = decltype(advance);
    sleep({[](const void* f) { return (*static_cast<const Advance*>(f))(); }, &advance},
          {[](const void* f, int rank) { return (*static_cast<const Ready*>(f))(rank); }, &ready}, context);
  }

  /// The first, short part of a wait: whether `arrived()` came to hold while it spun.
  template <class Arrived>
  bool spin(const Arrived& arrived) const {
    if (arrived()) return true;
    for (int i = 0; i < spins_; ++i) {
      pause();
      if (arrived()) return true;
    }
    return false;
  }

  /// Wake every peer that sleeps; call it after each flag that somebody may wait for.
  void ring() const {
    for (int r = 0; r < members_.world_size; ++r) {
      if (r != members_.rank) ring(r);
    }
  }
  /// Wake one rank's threads, this one's own too.
  void ring(int rank) const {
    if (load_flag((members_.control.flags(rank).*bell_).sleepers) != 0) wake(rank);
  }

  /// Throws as a wait would for ranks that are not ready, but for the deadline.
  template <class Ready>
  void check(const Ready& ready, const WaitContext& context) const {
    check_aborted();
    check_peers({[](const void* f, int rank) { return (*static_cast<const Ready*>(f))(rank); }, &ready}, context);
  }
  /// For whom a wait for these ranks is in the end.
  Roots roots_of(const std::vector<int>& ranks) const;
  /// Throws kTimeout for these ranks.
  [[noreturn]] void expire(const std::vector<int>& missing, const Roots& roots, const WaitContext& context) const;
  /// Throws kPeerLost if some rank called abort.
  void check_aborted() const;
  /// Wait without spinning: for progress threads, which must not take the core from the computation.
  void set_patient(bool patient);

 private:
  struct AdvanceRef {  // a callable, type-erased so that the slow path is compiled once
    bool (*call)(const void*);
    const void* object;
    bool operator()() const { return call(object); }
  };
  struct ReadyRef {
    bool (*call)(const void*, int);
    const void* object;
    bool operator()(int rank) const { return call(object, rank); }
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    asm volatile("yield");
#endif
  }

  void sleep(AdvanceRef advance, ReadyRef ready, const WaitContext& context) const;
  void look_at_graph(WatchedWait& wait, ReadyRef ready, const WaitContext& context) const;
  void check_peers(ReadyRef ready, const WaitContext& context) const;
  void warn_late(const std::vector<int>& late, const WaitContext& context) const;
  std::vector<int> not_ready(ReadyRef ready) const;
  Roots roots(ReadyRef ready, const WaitContext& context, bool expires) const;
  bool dead(int rank) const;
  bool is_stopped(int rank) const;
  bool still_waits(int rank, const Waits& waits) const;
  void wake(int rank) const;
  std::string activity(int rank, std::uint64_t seq) const;

  const Membership& members_;
  std::string_view group_;
  Bell RankFlags::* bell_;
  int spins_ = 0;
  int usual_spins_ = 0;
  Deadline::Clock::duration yield_for_{};
};

/// Processors that this process may run on.
int usable_cores();

}  // namespace pycomm::host
