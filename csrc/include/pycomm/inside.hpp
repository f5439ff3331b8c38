// What the calling thread is inside of. A long wait runs Python's signal handlers and finalizers now and then (its
// interrupt check), on the same thread. These may call the communicator that the wait belongs to; whoever would then
// wait for the call below finds out here that it cannot end before they return.
#pragma once

#include <string>

namespace pycomm {

class Inside {
 public:
  using Describe = std::string (*)(const void* object);
  enum class Kind { kCollective, kOther };  // a collective has its communicator's turn (turn.hpp)

  /// `owner`: the Membership of the wait's group; `describe(object)`: the call, for messages.
  Inside(const void* owner, Kind kind, Describe describe, const void* object);
  Inside(const Inside&) = delete;  // marks one scope
  Inside& operator=(const Inside&) = delete;
  ~Inside();

  /// The innermost wait of `owner` that this thread is inside of, or nullptr.
  static const Inside* find(const void* owner);
  static const Inside* find(const void* owner, Kind kind);
  /// That of this thread's innermost wait, or nullptr.
  static const void* innermost_owner();
  Kind kind() const { return kind_; }
  std::string what() const { return describe_(object_); }
  /// Throws if this thread is inside a collective of `owner`: a signal handler there would wait for the call below, and
  /// it for the handler. `rank`: for the message.
  static void check_outside(const void* owner, int rank);

 private:
  const void* owner_;
  Kind kind_;
  Describe describe_;
  const void* object_;
  const Inside* outer_;
};

}  // namespace pycomm
