#include "host/groups.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "host/fork_guard.hpp"
#include "host/group.hpp"

namespace pycomm::host {

namespace {

struct Roll {
  explicit Roll(std::uint64_t which) : generation(which) {}

  const std::uint64_t generation;
  std::mutex mutex;  // taken before any lock of a group
  std::vector<Group*> groups;
  std::uint64_t num_activities = 0;
  std::vector<std::pair<std::uint64_t, std::string>> activities;  // the last one is shown
  std::atomic<std::uint64_t> num_heard = 0;
  Root last_heard;

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
