// What a process shows to others while its callers wait: that it does, and for whom in the end. host/groups.hpp says
// how roots are found; host/groups.cpp shows them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pycomm {

/// A process that others wait for and that waits for nobody, as far as another one can see.
struct RootProcess {
  std::uint64_t token;  // of the process, equal in all its groups
  std::uint64_t hops;   // processes between, each of which waits for the next
};

/// For whom a wait is in the end.
struct Roots {
  std::vector<RootProcess> processes;
  std::string text;  // what the first of them is in

  /// Not this process itself, and none that goes round in a cycle.
  void add(const RootProcess& process, const std::string& what);
};

/// A wait of this process that has become a long one; while it lives, the process shows that it waits.
class ShownWait {
 public:
  enum class Kind {
    kForRanks,    // of a caller's thread
    kForWork,     // of a caller's thread, for asynchronous operations of `owner` (as Inside's; nullptr: of any)
    kInsideWork,  // of such an operation, for ranks: counts while a caller waits for it
  };
  ShownWait(Kind kind, const void* owner);
  ShownWait(const ShownWait&) = delete;  // registered by address
  ShownWait& operator=(const ShownWait&) = delete;
  ~ShownWait();

  Kind kind() const { return kind_; }
  const void* owner() const { return owner_; }
  const Roots& roots() const { return roots_; }
  /// Again, and again: whoever does not is taken to be stopped.
  void show(Roots roots = {});

 private:
  Kind kind_;
  const void* owner_;
  Roots roots_;
};

}  // namespace pycomm
