// All groups of this process, and what a process shows in each of them whichever group it is about: a failure that it
// has heard of, so that whoever waits for it elsewhere learns who is at the root should it end now; what it is in; and
// for whom it waits. Per process, because what is shown is about the process.
//
// Who is at the root of a wait. A rank that is stopped, or stuck in its own code, says nothing, and is found by
// deadlines alone; the first to expire may wait for one that waits itself. So every process that has waited for a while
// shows for whom it waits in the end, and looks again every 50 ms: for each rank that it misses, at what that rank's
// process shows if that waits, too, else at the rank itself. A root thus goes from process to process, one a look. One
// that has gone a way longer than there are ranks goes round in a cycle and is dropped, as is the process itself; if
// nothing is left, ranks wait for each other.
#pragma once

#include <cstdint>
#include <string>

#include "host/control.hpp"
#include "pycomm/error.hpp"
#include "pycomm/shown_wait.hpp"

namespace pycomm::host {

class Group;

void enroll(Group& group);
void dismiss(Group& group);

/// This process knows of a failure: show it in all groups. Thread-safe, as all of these.
void tell_of(const Root& root);

/// How many failures this process has heard of, and the last one.
std::uint64_t num_heard();
Root last_heard();

/// Add the roots of another process's wait, by way of that process.
void add_behind(Roots& roots, const Waits& waits);

/// As in Waits::written_ns.
std::uint64_t monotonic_ns();
/// What this process shows.
Waits shown_waits();
/// Roots may come by way of other hosts, of so many ranks together.
void expect_ranks(int world_size);

/// The calling thread runs calls of other threads: its waits are theirs.
void serve_callers();
bool serves_callers();

/// While it lives, peers whose wait for this process runs out are told that it is in `what`.
class Activity {
 public:
  explicit Activity(std::string what);
  Activity(const Activity&) = delete;  // marks one scope
  Activity& operator=(const Activity&) = delete;
  ~Activity();

 private:
  std::uint64_t id_;
};

}  // namespace pycomm::host
