#include "host/groups.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "host/fork_guard.hpp"
#include "host/group.hpp"
#include "host/issue_order.hpp"

namespace pycomm::host {

namespace {

thread_local bool is_serving = false;

struct Roll {
  explicit Roll(std::uint64_t which) : generation(which) {}

  const std::uint64_t generation;
  std::mutex mutex;  // taken before any lock of a group
  std::vector<Group*> groups;
  std::uint64_t num_activities = 0;
  std::vector<std::pair<std::uint64_t, std::string>> activities;  // the last one is shown
  std::atomic<std::uint64_t> num_heard = 0;
  Root last_heard;
  std::vector<const ShownWait*> waits;
  std::atomic<std::uint64_t> most_ranks = 1;  // of any group so far

  void expect(int world_size) {
    most_ranks = std::max<std::uint64_t>(most_ranks, static_cast<std::uint64_t>(world_size));
  }

  bool is_awaited(const void* owner) const {
    return std::ranges::any_of(waits, [&](const ShownWait* wait) {
      return wait->kind() == ShownWait::Kind::kForWork && (wait->owner() == nullptr || wait->owner() == owner);
    });
  }

  Waits shown() const {
    Waits shown{.written_ns = monotonic_ns()};
    bool is_known = false;
    Roots roots;
    for (const ShownWait* const wait : waits) {
      if (wait->kind() == ShownWait::Kind::kInsideWork && !is_awaited(wait->owner())) continue;
      shown.is_waiting = 1;
      if (wait->kind() == ShownWait::Kind::kForWork) continue;
      is_known = true;
      for (const RootProcess& process : wait->roots().processes) roots.add(process, wait->roots().text);
    }
    if (shown.is_waiting != 0 && !is_known) roots.processes.push_back({process_token(), 0});
    shown.num_roots = static_cast<std::uint32_t>(std::min<std::size_t>(roots.processes.size(), kMaxRanks));
    std::copy_n(roots.processes.begin(), shown.num_roots, shown.roots);
    put_text(shown.text, roots.text);
    return shown;
  }

  void show_waits() const {
    const Waits mine = shown();
    for (Group* const group : groups) group->show_waits(mine);
  }

  void show_activity() const {
    for (Group* const group : groups) group->show_activity(activities.empty() ? "" : activities.back().second);
  }
};

/// A forked child begins a new one: its parent's groups are not its own, and the lock may be held for good.
Roll& roll() {
  static std::atomic<Roll*> current = nullptr;
  Roll* found = current.load();
  while (found == nullptr || found->generation != fork_generation()) {
    auto fresh = std::make_unique<Roll>(fork_generation());
    if (current.compare_exchange_strong(found, fresh.get())) return *fresh.release();
  }
  return *found;
}

}  // namespace

void enroll(Group& group) {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  mine.groups.push_back(&group);
  mine.expect(group.world_size());
}

void dismiss(Group& group) {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  std::erase(mine.groups, &group);
}

void tell_of(const Root& root) {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  mine.last_heard = root;
  ++mine.num_heard;
  for (Group* const group : mine.groups) group->note(root);
}

std::uint64_t num_heard() { return roll().num_heard; }

Root last_heard() {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  return mine.last_heard;
}

std::uint64_t monotonic_ns() {
  const auto now = Deadline::Clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

void add_behind(Roots& roots, const Waits& waits) {
  for (std::uint32_t i = 0; i < waits.num_roots; ++i) {
    roots.add({waits.roots[i].token, waits.roots[i].hops + 1}, i == 0 ? text_in(waits.text) : "");
  }
}

Waits shown_waits() {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  return mine.shown();
}

void expect_ranks(int world_size) {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  mine.expect(world_size);
}

void serve_callers() { is_serving = true; }
bool serves_callers() { return is_serving; }

Activity::Activity(std::string what) {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  id_ = ++mine.num_activities;
  mine.activities.emplace_back(id_, std::move(what));
  mine.show_activity();
}

Activity::~Activity() {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  std::erase_if(mine.activities, [&](const auto& activity) { return activity.first == id_; });
  mine.show_activity();
}

}  // namespace pycomm::host

namespace pycomm {

using host::process_token;
using host::Roll;
using host::roll;

void Roots::add(const RootProcess& process, const std::string& what) {
  if (process.token == process_token() || process.hops > roll().most_ranks) return;
  const auto known = std::ranges::find(processes, process.token, &RootProcess::token);
  if (known != processes.end()) {
    known->hops = std::min(known->hops, process.hops);
  } else {
    processes.push_back(process);
  }
  if (text.empty()) text = what;
}

ShownWait::ShownWait(Kind kind, const void* owner) : kind_(kind), owner_(owner) {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  mine.waits.push_back(this);
  mine.show_waits();
}

ShownWait::~ShownWait() {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  std::erase(mine.waits, this);
  mine.show_waits();
}

void ShownWait::show(Roots roots) {
  Roll& mine = roll();
  const std::lock_guard lock(mine.mutex);
  roots_ = std::move(roots);
  mine.show_waits();
}

}  // namespace pycomm
