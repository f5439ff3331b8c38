#include "pycomm/inside.hpp"

#include "pycomm/error.hpp"

namespace pycomm {

namespace {

thread_local const Inside* innermost = nullptr;

}  // namespace

Inside::Inside(const void* owner, Kind kind, Describe describe, const void* object)
    : owner_(owner), kind_(kind), describe_(describe), object_(object), outer_(innermost) {
  innermost = this;
}

Inside::~Inside() { innermost = outer_; }

const Inside* Inside::find(const void* owner) {
  const Inside* inside = innermost;
  while (inside != nullptr && inside->owner_ != owner) inside = inside->outer_;
  return inside;
}

const void* Inside::innermost_owner() { return innermost == nullptr ? nullptr : innermost->owner_; }

const Inside* Inside::find(const void* owner, Kind kind) {
  const Inside* inside = innermost;
  while (inside != nullptr && (inside->owner_ != owner || inside->kind_ != kind)) inside = inside->outer_;
  return inside;
}

void Inside::check_outside(const void* owner, int rank) {
  const Inside* const inside = find(owner, Kind::kCollective);
  if (inside == nullptr) return;
  throw Error(ErrorKind::kGeneral, "rank " + std::to_string(rank) + " is inside " + inside->what() +
                                       ": a signal handler cannot make another call of that communicator there. Let it "
                                       "set a flag for after the call, or call close() or abort(), which end the call");
}

}  // namespace pycomm
