// How the ranks of one host find each other: rank 0 listens on an abstract Unix socket (no name in any file system),
// the others connect, each shows what it is, and rank 0 hands out the control segment and a descriptor of every
// process.
//
// The sockets stay open as a star: rank 0 sends the descriptors of later segments over them. Nothing but fixed-size
// structs crosses. Anybody on the host can connect, so nobody is waited for alone: processes of other users are turned
// away at once (SO_PEERCRED), and so is whoever does not show the key that the ranks were told (docs/security.md).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "host/control.hpp"
#include "host/local_socket.hpp"
#include "host/segment.hpp"
#include "pycomm/deadline.hpp"

namespace pycomm::host {

inline constexpr std::uint32_t kProtocolVersion = 2;

/// Identifies the sources that this binary was built from: two builds that differ must not share memory.
std::uint64_t build_id();

/// Rank 0's side of the meeting point.
class Listener {
 public:
  Listener();
  /// For the other ranks' eyes only: 64 hexadecimal digits, random.
  std::string address() const { return invitation_.text(); }
  const Invitation& invitation() const { return invitation_; }
  const UniqueFd& fd() const { return fd_; }

 private:
  Invitation invitation_;
  UniqueFd fd_;
};

/// What a rank has after the meeting.
struct Membership {
  int rank = 0;
  int world_size = 1;
  Tuning tuning;
  Control control;
  std::vector<UniqueFd> sockets;  // rank 0: sockets[r] leads to rank r; others: sockets[0] leads to rank 0
  std::vector<UniqueFd> pidfds;   // pidfds[r] becomes readable when the process of rank r ends
  std::vector<std::int32_t> pids;
  std::vector<std::uint64_t> tokens;  // tokens[r]: the process of rank r, the same in all its communicators
};

/// How a rank waits for the others of its host.
struct Meeting {
  const char* op = "init";
  std::vector<int> names;  // by rank: what errors call it; empty: its number
  Deadline deadline;
  InterruptCheck interrupt = nullptr;
  /// Called about every 50 ms with the names of those that are still missing; throws if waiting for them is in vain.
  std::function<void(const std::vector<int>&)> check;
  /// Called with them at the deadline, to throw a better error than meet() has.
  std::function<void(const std::vector<int>&)> expire;

  int name_of(int rank) const { return names.empty() ? rank : names[static_cast<std::size_t>(rank)]; }
};

/// Rank 0 (`listener` given) or another rank (`address` given; empty for a world of one). `tuning`: rank 0's counts.
/// Throws Error: kTimeout names the ranks that did not come; kGeneral when a rank brings another world size, protocol
/// or build, on both sides; what `meeting.check` throws.
Membership meet(int rank, int world_size, const Listener* listener, const std::string& address, const Tuning& tuning,
                const Meeting& meeting);

/// Send one descriptor with a number that tells the receiver what it is.
void send_fd(const UniqueFd& socket, int fd, std::uint64_t id);
/// Receive it from rank `sender`. Throws Error if another one comes, that rank is gone, or the deadline passes; with
/// errno's code if this process may have no more descriptors, after which the next one can be received.
UniqueFd recv_fd(const UniqueFd& socket, int sender, std::uint64_t id, const Meeting& meeting);

}  // namespace pycomm::host
