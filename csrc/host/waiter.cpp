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
#include <span>

namespace pycomm::host {

namespace {

using std::chrono::duration_cast;
using std::chrono::nanoseconds;
constexpr auto kSlice = std::chrono::milliseconds(50);
// After the last sign of a process that waits. Only one that is stopped has none for a second; where that cannot be
// seen, one may have had no core for so long.
constexpr std::uint64_t kFreshNs = 250'000'000;
constexpr std::uint64_t kSilentNs = 1'000'000'000;
constexpr std::uint64_t kStarvedNs = 5'000'000'000;
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

/// The ends of peers, as one error.
class Ends {
 public:
  Ends(const Membership& members, std::string_view group) : members_(members), group_(group) {}

  bool empty() const { return error_.surfaced.empty(); }

  /// `rank` has ended; `how` follows its name.
  void add(int rank, const std::string& how) {
    const RankFlags& flags = members_.control.flags(rank);
    const std::size_t num_roots = std::min<std::size_t>(load_flag(flags.num_roots), kMaxRanks);
    const std::uint64_t own = token(rank);
    const std::span<const std::uint64_t> roots(num_roots == 0 ? &own : flags.roots,
                                               std::max<std::size_t>(num_roots, 1));
    why_ += (why_.empty() ? "rank " : "; rank ") + std::to_string(rank) + how;
    if (num_roots == 0) is_seen_ = true;
    if (num_roots != 0 && passed_on_.empty()) passed_on_ = text_in(flags.reason);
    bool is_named = false;
    for (int r = 0; r < members_.world_size; ++r) {
      // Not this rank: the other one was lost to it, whoever is to blame.
      if (num_roots == 0 || r == members_.rank || std::ranges::find(roots, token(r)) == roots.end()) continue;
      add_new(error_.ranks, r);
      is_named = true;
    }
    if (!is_named) add_new(error_.ranks, rank);
    for (const std::uint64_t root : roots) add_new(error_.root.processes, root);
    error_.surfaced.push_back(rank);
  }

  /// `prefix`: what this rank is in, and of which group, if it is in a call.
  Error error(const std::string& prefix) const {
    Error named(ErrorKind::kPeerLost, prefix + why_);
    named.group = group_;
    named.ranks = error_.ranks;
    std::ranges::sort(named.ranks);
    named.surfaced = error_.surfaced;
    const std::string where = prefix.empty() ? " (group '" + named.group + "')" : "";
    // What was seen here explains it; else it is told as it was heard, so that it stays one sentence from group to
    // group.
    named.root = {error_.root.processes, is_seen_ ? prefix + why_ + where : passed_on_};
    return named;
  }

 private:
  std::uint64_t token(int rank) const { return members_.tokens[static_cast<std::size_t>(rank)]; }
  template <class T>
  static void add_new(std::vector<T>& to, const T& value) {
    if (std::ranges::find(to, value) == to.end()) to.push_back(value);
  }

  const Membership& members_;
  std::string_view group_;
  Error error_{ErrorKind::kPeerLost, ""};
  std::string why_;
  std::string passed_on_;
  bool is_seen_ = false;
};

std::string describe_wait(const void* context) { return where(*static_cast<const WaitContext*>(context)); }

}  // namespace

std::string seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", value);
  return text;
}

std::string where(const WaitContext& context) {
  return describe(context.call) + " #" + std::to_string(context.seq) + " of group '" + std::string(context.group) + "'";
}

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return ::sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

Waiter::Waiter(const Membership& members, std::string_view group, Bell RankFlags::* bell)
    : members_(members), group_(group), bell_(bell) {
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
  std::optional<Activity> activity;
  std::optional<ShownWait> shown;
  const bool is_callers = context.interrupt != nullptr && !serves_callers();
  const bool is_collective = bell_ == &RankFlags::calls && context.interrupt != nullptr;
  const Inside inside(&members_, is_collective ? Inside::Kind::kCollective : Inside::Kind::kOther, &describe_wait,
                      &context);
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
    const bool is_long = Deadline::Clock::now() - start >= kSlice;
    if (is_long && context.interrupt != nullptr && !activity) activity.emplace(where(context));
    if (is_long) {
      if (!shown) shown.emplace(is_callers ? ShownWait::Kind::kForRanks : ShownWait::Kind::kInsideWork, &members_);
      shown->show(roots(ready, context, false));
    }
    if (context.watch.graph != nullptr && is_long) {
      if (!watched) watched.emplace(*context.watch.graph, *context.watch.ranks, where(context));
      look_at_graph(*watched, ready, context);
    }
    check_peers(ready, context);
    if (context.interrupt != nullptr) context.interrupt();
    const auto now = Deadline::Clock::now();
    if (context.deadline.expired(now)) expire(not_ready(ready), roots(ready, context, true), context);
    if (!warned && now - start > kLate) {
      warn_late(not_ready(ready), context);
      warned = true;
    }
  }
}

void Waiter::look_at_graph(WatchedWait& wait, ReadyRef ready, const WaitContext& context) const {
  Needs needs;
  if (context.watch.needs != nullptr) {
    needs = (*context.watch.needs)();
  } else {
    needs.all = not_ready(ready);
  }
  wait.look(needs);
}

void Waiter::check_aborted() const {
  for (int r = 0; r < members_.world_size; ++r) {
    const RankFlags& flags = members_.control.flags(r);
    if (load_flag(flags.aborted) == 0) continue;
    Ends ends(members_, group_);
    ends.add(r, " aborted: " + text_in(flags.reason));
    throw ends.error("");
  }
}

void Waiter::check_peers(ReadyRef ready, const WaitContext& context) const {
  Ends ends(members_, group_);
  for (int r = 0; r < members_.world_size; ++r) {
    if (ready(r)) continue;
    const RankFlags& flags = members_.control.flags(r);
    const auto state = static_cast<RankState>(load_flag(flags.state));
    const bool gone = dead(r);
    if ((state == RankState::kAlive && !gone) || ready(r)) continue;  // what it did before it ended counts
    const bool has_root = load_flag(flags.num_roots) != 0;
    if (state == RankState::kFailed) {
      ends.add(r, (load_flag(flags.aborted) != 0 ? " aborted: " : " gave up: ") + text_in(flags.reason));
    } else {
      const std::string process = " (process " + std::to_string(members_.pids[static_cast<std::size_t>(r)]) + ")";
      const std::string how = state == RankState::kClosed
                                  ? has_root ? " left" : " exited normally (it closed the communicator)"
                                  : process + " died";
      ends.add(r, how + (has_root ? " after a failure: " + text_in(flags.reason) : ""));
    }
  }
  if (!ends.empty()) throw ends.error(where(context) + ": ");
}

std::string Waiter::activity(int rank, std::uint64_t seq) const {
  const std::uint64_t completed = load_flag(members_.control.flags(rank).completed);
  const CallSlot* last = nullptr;  // what it called last: the later of its two slots
  for (std::uint64_t s = 0; s < 2; ++s) {
    const CallSlot& slot = members_.control.slot(rank, s);
    if (load_flag(slot.seq) != 0 && (last == nullptr || load_flag(slot.seq) > load_flag(last->seq))) last = &slot;
  }
  const std::string name = "rank " + std::to_string(rank);
  const RankFlags& flags = members_.control.flags(rank);
  const std::string shown = load_flag(flags.is_active) != 0 ? name + " is in " + text_in(flags.activity) : "";
  if (last == nullptr) return shown.empty() ? name + " has called nothing yet" : shown;
  const std::uint64_t called = load_flag(last->seq);
  const std::string what = describe(last->call) + " #" + std::to_string(called);
  if (called > completed) return name + (called == seq ? " is in the same call, not done" : " is in " + what);
  return shown.empty() ? name + " completed " + what + " and has called nothing since" : shown;
}

bool Waiter::is_stopped(int rank) const {
  const char state = state_of(members_.pidfds[static_cast<std::size_t>(rank)].get());
  return state == 'T' || state == 't';
}

bool Waiter::still_waits(int rank, const Waits& waits) const {
  if (waits.is_waiting == 0) return false;
  const std::uint64_t now = monotonic_ns();
  const std::uint64_t age = now - std::min(waits.written_ns, now);
  if (age < kFreshNs) return true;
  const char state = state_of(members_.pidfds[static_cast<std::size_t>(rank)].get());
  if (state == '\0') return age < kSilentNs;
  return state != 'T' && state != 't' && age < kStarvedNs;
}

Roots Waiter::roots_of(const std::vector<int>& ranks) const {
  Roots roots;
  for (const int r : ranks) {
    const RankFlags& flags = members_.control.flags(r);
    if (load_flag(flags.state) != static_cast<std::uint32_t>(RankState::kAlive) || dead(r)) continue;
    Waits waits;
    const std::size_t num_heard = std::min<std::size_t>(load_flag(flags.num_roots), kMaxRanks);
    if (flags.waits.read(waits) && still_waits(r, waits)) {
      add_behind(roots, waits);
    } else if (num_heard != 0) {  // and has not gone on since
      for (std::size_t i = 0; i < num_heard; ++i) roots.add({flags.roots[i], 1}, text_in(flags.reason));
    } else {
      const std::string state = is_stopped(r) ? ", and is stopped" : "";
      roots.add({members_.tokens[static_cast<std::size_t>(r)], 0},
                activity(r, 0) + state + " (group '" + std::string(group_) + "')");
    }
  }
  return roots;
}

std::vector<int> Waiter::not_ready(ReadyRef ready) const {
  std::vector<int> ranks;
  for (int r = 0; r < members_.world_size; ++r) {
    if (!ready(r)) ranks.push_back(r);
  }
  return ranks;
}

Roots Waiter::roots(ReadyRef ready, const WaitContext& context, bool expires) const {
  return roots_of(context.misses != nullptr ? (*context.misses)(expires) : not_ready(ready));
}

void Waiter::expire(const std::vector<int>& missing, const Roots& roots, const WaitContext& context) const {
  std::vector<std::uint64_t> processes;
  std::vector<int> here;  // of those, the ones that are in this group
  for (const RootProcess& root : roots.processes) {
    processes.push_back(root.token);
    const auto rank = std::ranges::find(members_.tokens, root.token);
    if (rank != members_.tokens.end()) here.push_back(static_cast<int>(rank - members_.tokens.begin()));
  }
  std::ranges::sort(here);
  if (processes.empty()) {  // ranks that wait for each other
    for (const int r : missing) processes.push_back(members_.tokens[static_cast<std::size_t>(r)]);
  }
  const std::vector<int>& named = here.empty() ? missing : here;
  std::string text =
      where(context) + ": " + plural(named) + " did not arrive within " + seconds(context.deadline.timeout_s());
  for (const int r : missing) {
    text += "; " + activity(r, context.seq) + (is_stopped(r) ? ", and is stopped" : "");
  }
  if (named != missing || here.empty()) text += roots.text.empty() ? "" : kAtRoot + roots.text;
  Error error(ErrorKind::kTimeout, text);
  error.op = describe(context.call);
  error.seq = context.seq;
  error.group = context.group;
  error.ranks = named;
  error.root = {processes, text};
  tell_of(error.root);  // before this process no longer shows that it waits
  throw error;
}

void Waiter::warn_late(const std::vector<int>& late, const WaitContext& context) const {
  std::string details;
  for (const int r : late) details += "; " + activity(r, context.seq);
  // stderr and not Python's logging: this may be a thread that must never wait for the GIL.
  const std::string text = "pycomm: warning: rank " + std::to_string(members_.rank) + " in " + where(context) +
                           " has waited 30 s for " + plural(late) + details + "\n";
  std::fputs(text.c_str(), stderr);
}

}  // namespace pycomm::host
