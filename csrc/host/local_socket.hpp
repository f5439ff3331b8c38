// Sockets between the processes of one host: abstract Unix addresses (no name in any file system), fixed-size messages,
// descriptors beside them. Whatever arrives is somebody else's: lengths are checked before anything is used.
#pragma once

#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "host/segment.hpp"

namespace pycomm::host {

inline constexpr std::size_t kMostDescriptors = 253;  // in one message; the kernel's SCM_MAX_FD

/// Where a Listener is found, and what proves that one was told so by the job itself.
struct Invitation {
  static constexpr std::size_t kHexDigits = 64;
  std::string name;           // 32 hexadecimal digits, of the socket
  std::uint64_t key[2] = {};  // part of every greeting; unlike the name, other processes cannot look it up

  static Invitation random();
  /// Throws kGeneral unless `text` is kHexDigits hexadecimal digits.
  static Invitation parse(const std::string& text);
  std::string text() const;
};

/// A socket that listens at `name`; its accept() does not wait.
UniqueFd listen_at(const std::string& name);
/// Connect to `name`. Returns no socket where nobody listens, or where more wait to be accepted than fit: errno says
/// which.
UniqueFd connect_to(const std::string& name);
/// The process at the other end when the connection was made.
ucred peer_of(const UniqueFd& socket);
bool same_user(const UniqueFd& socket);
/// Whether `fd` stands for a process, and, if that can be seen from here, for process `pid`.
bool is_pidfd_of(int fd, std::int32_t pid);
/// The state of its process as /proc tells it, 'T' for one that is stopped; '\0' if that cannot be seen from here.
char state_of(int pidfd);

/// Send `bytes` bytes and descriptors in one message.
void send_bytes(int socket, const void* data, std::size_t bytes, std::span<const int> fds);
/// Receive one message and its descriptors; false at the end, or if it does not have exactly `bytes` bytes or more
/// descriptors came than a message of ours has. Never waits: poll first.
bool recv_bytes(int socket, void* data, std::size_t bytes, std::vector<UniqueFd>& fds);

template <class Message>
void send_message(const UniqueFd& socket, const Message& message, std::span<const int> fds) {
  static_assert(std::is_trivially_copyable_v<Message>);
  send_bytes(socket.get(), &message, sizeof(message), fds);
}

template <class Message>
bool recv_message(const UniqueFd& socket, Message& message, std::vector<UniqueFd>& fds) {
  static_assert(std::is_trivially_copyable_v<Message>);
  return recv_bytes(socket.get(), &message, sizeof(message), fds);
}

}  // namespace pycomm::host
