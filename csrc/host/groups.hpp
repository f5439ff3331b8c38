// All groups of this process, and what a process shows in each of them whichever group it is about: a failure that it
// has heard of, so that whoever waits for it elsewhere learns who is at the root should it end now; and what it is in.
// Per process, because what is shown is about the process.
#pragma once

#include <cstdint>
#include <string>

#include "pycomm/error.hpp"

namespace pycomm::host {

class Group;

void enroll(Group& group);
void dismiss(Group& group);

/// This process knows of a failure: show it in all groups. Thread-safe, as all of these.
void tell_of(const Root& root);

/// How many failures this process has heard of, and the last one.
std::uint64_t num_heard();
Root last_heard();

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
