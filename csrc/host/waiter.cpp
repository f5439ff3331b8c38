#include "host/waiter.hpp"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <limits>

#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

using std::chrono::duration_cast;
using std::chrono::nanoseconds;
constexpr auto kSlice = std::chrono::milliseconds(50);
constexpr auto kLate = std::chrono::seconds(30);
constexpr auto kYield = std::chrono::microseconds(500);  // about one wake-up of a sleeping thread, tenfold
constexpr auto kPatientYield = std::chrono::microseconds(20);
// 2 to 20 µs of pauses, whose length differs between processors. Ranks that share a core in spite of all wait so long
// for each other at every step.
constexpr int kSpins = 200;

std::string plural(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(ranks[i]);
  return text;
}

std::string where(const WaitContext& context) {
  return describe(context.call) + " #" + std::to_string(context.seq) + " of group '" + std::string(context.group) + "'";
}

std::string seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", value);
  return text;
}

}  // namespace

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return ::sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

Waiter::Waiter(const Membership& members, Bell RankFlags::* bell) : members_(members), bell_(bell) {
  usual_spins_ = members.world_size <= usable_cores() ? kSpins : 0;
  set_patient(false);
}

void Waiter::set_patient(bool patient) {
  spins_ = patient ? 0 : usual_spins_;
  yield_for_ = patient ? Deadline::Clock::duration(kPatientYield) : Deadline::Clock::duration(kYield);
}

void Waiter::wake(int rank) const {
  std::uint32_t& doorbell = (members_.control.flags(rank).*bell_).doorbell;
  add_flag(doorbell, 1u);
  ::syscall(SYS_futex, &doorbell, FUTEX_WAKE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
}

bool Waiter::dead(int rank) const {
  pollfd entry{.fd = members_.pidfds[rank].get(), .events = POLLIN, .revents = 0};
  return ::poll(&entry, 1, 0) > 0;
}

void Waiter::sleep(AdvanceRef advance, ReadyRef ready, const WaitContext& context) const {
  const auto start = Deadline::Clock::now();
  while (Deadline::Clock::now() - start < yield_for_) {
    ::sched_yield();
    if (advance()) return;
  }
  Bell& mine = members_.control.flags(members_.rank).*bell_;
  bool warned = false;
  std::optional<WatchedWait> watched;
  while (true) {
    // The order of these three is the protocol of signal.hpp: announce, remember the bell, look again.
    add_flag(mine.sleepers, 1u);
    const std::uint32_t bell = load_flag(mine.doorbell);
    const bool arrived = advance();
    if (!arrived) {
      const auto left = std::min<nanoseconds>(kSlice, duration_cast<nanoseconds>(context.deadline.left()));
      const timespec slice{.tv_sec = 0, .tv_nsec = left.count()};
      ::syscall(SYS_futex, &mine.doorbell, FUTEX_WAIT, bell, &slice, nullptr, 0);
    }
    add_flag(mine.sleepers, ~0u);  // minus one
    if (arrived || advance()) return;
    check_aborted();
    if (context.watch.graph != nullptr && Deadline::Clock::now() - start >= kSlice) {
      if (!watched) watched.emplace(*context.watch.graph, *context.watch.ranks, where(context));
      look_at_graph(*watched, ready, context);
    }
    check_peers(ready, context);
    if (context.interrupt != nullptr) context.interrupt();
    const auto now = Deadline::Clock::now();
    if (context.deadline.expired(now)) expire(ready, context);
    if (!warned && now - start > kLate) {
      warn_late(ready, context);
      warned = true;
    }
  }
}

void Waiter::look_at_graph(WatchedWait& wait, ReadyRef ready, const WaitContext& context) const {
  Needs needs;
  if (context.watch.needs != nullptr) {
    needs = (*context.watch.needs)();
  } else {
    for (int r = 0; r < members_.world_size; ++r) {
      if (!ready(r)) needs.all.push_back(r);
    }
  }
  wait.look(needs);
}

void Waiter::check_aborted() const {
  for (int r = 0; r < members_.world_size; ++r) {
    const RankFlags& flags = members_.control.flags(r);
    if (load_flag(flags.aborted) == 0) continue;
    Error error(ErrorKind::kPeerLost, "rank " + std::to_string(r) + " aborted: " + flags.reason);
    error.ranks = {r};
    throw error;
  }
}

void Waiter::check_peers(ReadyRef ready, const WaitContext& context) const {
  std::string why;
  std::vector<bool> lost(static_cast<std::size_t>(members_.world_size), false);
  const auto add = [&](int rank, const std::string& reason) {
    lost[static_cast<std::size_t>(rank)] = true;
    why += (why.empty() ? "" : "; ") + reason;
  };
  for (int r = 0; r < members_.world_size; ++r) {
    if (ready(r)) continue;
    const RankFlags& flags = members_.control.flags(r);
    const auto state = static_cast<RankState>(load_flag(flags.state));
    const bool gone = dead(r);
    if ((state == RankState::kAlive && !gone) || ready(r)) continue;  // what it did before it ended counts
    const std::string name = "rank " + std::to_string(r);
    if (state == RankState::kFailed) {
      why += (why.empty() ? "" : "; ") + name + " gave up: " + flags.reason;
      bool root_is_elsewhere = false;
      for (int root = 0; root < members_.world_size; ++root) {
        if ((flags.lost[root / 64] >> (root % 64) & 1) == 0) continue;
        lost[static_cast<std::size_t>(root)] = root_is_elsewhere = true;
      }
      if (!root_is_elsewhere) lost[static_cast<std::size_t>(r)] = true;
    } else if (state == RankState::kClosed) {
      add(r, name + " exited normally (it closed the communicator)");
    } else {
      add(r, name + " (process " + std::to_string(members_.pids[r]) + ") died");
    }
  }
  if (why.empty()) return;
  Error error(ErrorKind::kPeerLost, where(context) + ": " + why);
  for (int r = 0; r < members_.world_size; ++r) {
    if (lost[static_cast<std::size_t>(r)]) error.ranks.push_back(r);
  }
  throw error;
}

std::string Waiter::activity(int rank, std::uint64_t seq) const {
  const std::uint64_t completed = load_flag(members_.control.flags(rank).completed);
  const CallSlot* last = nullptr;  // what it called last: the later of its two slots
  for (std::uint64_t s = 0; s < 2; ++s) {
    const CallSlot& slot = members_.control.slot(rank, s);
    if (load_flag(slot.seq) != 0 && (last == nullptr || load_flag(slot.seq) > load_flag(last->seq))) last = &slot;
  }
  const std::string name = "rank " + std::to_string(rank);
  if (last == nullptr) return name + " has called nothing yet";
  const std::uint64_t called = load_flag(last->seq);
  const std::string what = describe(last->call) + " #" + std::to_string(called);
  if (called > completed) return name + (called == seq ? " is in the same call, not done" : " is in " + what);
  return name + " completed " + what + " and has called nothing since";
}

void Waiter::expire(ReadyRef ready, const WaitContext& context) const {
  Error error(ErrorKind::kTimeout, "");
  std::string details;
  for (int r = 0; r < members_.world_size; ++r) {
    if (ready(r)) continue;
    error.ranks.push_back(r);
    details += "; " + activity(r, context.seq);
  }
  Error named(ErrorKind::kTimeout, where(context) + ": " + plural(error.ranks) + " did not arrive within " +
                                       seconds(context.deadline.timeout_s()) + details);
  named.op = describe(context.call);
  named.seq = context.seq;
  named.group = context.group;
  named.ranks = std::move(error.ranks);
  throw named;
}

void Waiter::warn_late(ReadyRef ready, const WaitContext& context) const {
  std::vector<int> late;
  std::string details;
  for (int r = 0; r < members_.world_size; ++r) {
    if (ready(r)) continue;
    late.push_back(r);
    details += "; " + activity(r, context.seq);
  }
  // stderr and not Python's logging: this may be a thread that must never wait for the GIL.
  const std::string text = "pycomm: warning: rank " + std::to_string(members_.rank) + " in " + where(context) +
                           " has waited 30 s for " + plural(late) + details + "\n";
  std::fputs(text.c_str(), stderr);
}

}  // namespace pycomm::host
