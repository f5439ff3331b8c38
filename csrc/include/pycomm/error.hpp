// The one exception of the C++ core. `kind` picks the Python class (bindings/bind_errors.cpp); the other fields become
// its attributes. Wrong arguments are std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace pycomm {

enum class ErrorKind {
  kGeneral,      // PycommError
  kTimeout,      // PeerTimeoutError: ranks did not arrive before the deadline
  kPeerLost,     // PeerLostError: ranks died, left or aborted
  kMismatch,     // MismatchError: ranks called different things; nothing was written
  kStrictOrder,  // StrictOrderError: NCCL would hang on this order of calls; nothing was written
  kDeadlock,     // StrictOrderError: calls wait for each other; the ranks are out of step
  kWaitExpired,  // TimeoutError: Work::wait(timeout) ran out, the operation goes on
  kOutOfMemory,  // MemoryError
  kUnavailable,  // BackendUnavailableError: a library or device is not here
};

/// A failure as it travels from group to group, in which ranks have other numbers.
struct Root {
  std::vector<std::uint64_t> processes;  // at the root of it, by their tokens (Membership::tokens)
  std::string text;                      // what happened to them; names them and their group
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind which, std::string message) : std::runtime_error(std::move(message)), kind(which) {}

  ErrorKind kind;
  int code = 0;                    // kGeneral: errno, where the system has refused something
  std::string op;                  // kTimeout: what this rank was doing
  std::uint64_t seq = 0;           // kTimeout: its sequence number in the group
  std::string group;               // kTimeout, kPeerLost: the communicator's name
  std::vector<int> ranks;          // kTimeout: missing; kPeerLost: at the root of the failure
  std::vector<int> surfaced;       // kPeerLost: the ranks that ended, whoever is at the root
  Root root;                       // kTimeout, kPeerLost: the same for processes that are not in this group
  std::vector<std::string> calls;  // kMismatch: calls[rank]
};

/// Throw what errno says about `what`.
[[noreturn]] inline void throw_errno(const std::string& what) {
  const int code = errno;
  Error error(ErrorKind::kGeneral, what + ": " + std::strerror(code));
  error.code = code;
  throw error;
}

}  // namespace pycomm
