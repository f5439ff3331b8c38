// How the ranks of one host find each other: rank 0 listens on an abstract Unix socket (no name in any file system),
// the others connect, each shows what it is, and rank 0 hands out the control segment and a descriptor of every
// process.
//
// The sockets stay open as a star: rank 0 sends the descriptors of later segments over them. Only processes of the
// same user are let in (SO_PEERCRED), and nothing but fixed-size structs crosses.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "host/control.hpp"
#include "host/segment.hpp"
#include "pycomm/deadline.hpp"

namespace pycomm::host {

inline constexpr std::uint32_t kProtocolVersion = 1;

/// Called about every 50 ms by every wait; throws to end it (Ctrl-C). May be nullptr.
using InterruptCheck = void (*)();

/// Identifies the sources that this binary was built from: two builds that differ must not share memory.
std::uint64_t build_id();

/// Rank 0's side of the meeting point.
class Listener {
 public:
  Listener();
  const std::string& address() const { return address_; }  // random, 32 hexadecimal digits
  const UniqueFd& fd() const { return fd_; }

 private:
  std::string address_;
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

/// Rank 0 (`listener` given) or another rank (`address` given; empty for a world of one). Throws Error: kTimeout names
/// the ranks that did not come; kGeneral when a rank brings another world size, protocol or build, on both sides.
Membership meet(int rank, int world_size, const Listener* listener, const std::string& address, const Tuning& tuning,
                const Deadline& deadline, InterruptCheck interrupt);

/// Send one descriptor with a number that tells the receiver what it is.
void send_fd(const UniqueFd& socket, int fd, std::uint64_t id);
/// Receive it from rank `sender`. Throws Error if another one comes, that rank is gone, or the deadline passes; with
/// errno's code if this process may have no more descriptors, after which the next one can be received.
UniqueFd recv_fd(const UniqueFd& socket, int sender, std::uint64_t id, const Deadline& deadline,
                 InterruptCheck interrupt);

}  // namespace pycomm::host
