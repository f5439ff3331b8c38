#include "host/local_socket.hpp"

#include <fcntl.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <optional>

#include "host/issue_order.hpp"
#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

constexpr int kBacklog = 512;

struct Address {
  sockaddr_un name{};
  socklen_t bytes = 0;

  explicit Address(const std::string& of) {
    const std::string path = "pycomm-" + of;
    if (path.size() >= sizeof(name.sun_path)) {
      throw Error(ErrorKind::kGeneral, "a socket's name of " + std::to_string(path.size()) + " characters is too long");
    }
    name.sun_family = AF_UNIX;
    std::copy(path.begin(), path.end(), name.sun_path + 1);  // sun_path[0] == 0: the abstract namespace
    bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + path.size());
  }
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&name); }
};

UniqueFd new_socket(int flags) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | flags, 0));
  if (!fd) throw_errno("socket(AF_UNIX)");
  return fd;
}

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

Invitation Invitation::random() {
  std::uint64_t numbers[4];
  fill_random(numbers, sizeof(numbers));
  return {.name = hex(numbers[0]) + hex(numbers[1]), .key = {numbers[2], numbers[3]}};
}

Invitation Invitation::parse(const std::string& text) {
  const auto digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  if (text.size() != kHexDigits || !std::all_of(text.begin(), text.end(), digit)) {
    throw Error(ErrorKind::kGeneral, "the address where the ranks of this host meet has " +
                                         std::to_string(text.size()) + " characters; it is " +
                                         std::to_string(kHexDigits) +
                                         " hexadecimal digits. Did something else write "
                                         "into the job's store?");
  }
  Invitation invitation{.name = text.substr(0, 32)};
  for (std::size_t i = 0; i < 2; ++i) {
    const char* const begin = text.data() + 32 + 16 * i;
    std::from_chars(begin, begin + 16, invitation.key[i], 16);
  }
  return invitation;
}

std::string Invitation::text() const { return name + hex(key[0]) + hex(key[1]); }

UniqueFd listen_at(const std::string& name) {
  UniqueFd fd = new_socket(SOCK_NONBLOCK);
  Address address(name);
  if (::bind(fd.get(), address.get(), address.bytes) != 0) throw_errno("bind of an abstract socket");
  if (::listen(fd.get(), kBacklog) != 0) throw_errno("listen");
  return fd;
}

UniqueFd connect_to(const std::string& name) {
  UniqueFd fd = new_socket(SOCK_NONBLOCK);
  Address address(name);
  while (::connect(fd.get(), address.get(), address.bytes) != 0) {
    if (errno == EINTR) continue;
    if (errno == EAGAIN || errno == ECONNREFUSED) return {};
    throw_errno("connecting to a rank of this host");
  }
  const int flags = ::fcntl(fd.get(), F_GETFL);
  if (flags < 0 || ::fcntl(fd.get(), F_SETFL, flags & ~O_NONBLOCK) != 0) throw_errno("fcntl of a socket");
  return fd;
}

ucred peer_of(const UniqueFd& socket) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) throw_errno("SO_PEERCRED");
  return peer;
}

bool same_user(const UniqueFd& socket) { return peer_of(socket).uid == ::geteuid(); }

namespace {

/// Of a pidfd, as this process sees it: 0 or -1 if it does not. Nothing: it is none.
std::optional<long> pid_of(int fd) {
  std::ifstream info("/proc/self/fdinfo/" + std::to_string(fd));
  std::string field;
  while (info >> field) {
    long value = 0;
    if (field == "Pid:" && info >> value) return value;
  }
  return {};
}

}  // namespace

bool is_pidfd_of(int fd, std::int32_t pid) {
  const std::optional<long> found = pid_of(fd);
  return found && (*found == pid || *found <= 0 || pid <= 0);
}

char state_of(int pidfd) {
  const std::optional<long> pid = pid_of(pidfd);
  if (!pid || *pid <= 0) return '\0';
  std::ifstream stat("/proc/" + std::to_string(*pid) + "/stat");
  std::string line;
  std::getline(stat, line);
  const std::size_t name_end = line.rfind(") ");  // a name may hold anything
  return name_end == std::string::npos || name_end + 2 >= line.size() ? '\0' : line[name_end + 2];
}

void send_bytes(int socket, const void* data, std::size_t bytes, std::span<const int> fds) {
  if (fds.size() > kMostDescriptors) throw Error(ErrorKind::kGeneral, "too many descriptors for one message");
  iovec body{.iov_base = const_cast<void*>(data), .iov_len = bytes};
  alignas(cmsghdr) std::byte space[CMSG_SPACE(kMostDescriptors * sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &body;
  header.msg_iovlen = 1;
  if (!fds.empty()) {
    header.msg_control = space;
    header.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* const control = CMSG_FIRSTHDR(&header);
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(control), fds.data(), fds.size_bytes());
  }
  while (::sendmsg(socket, &header, MSG_NOSIGNAL) < 0) {
    if (errno != EINTR) throw_errno("sendmsg to a rank of this host");
  }
}

bool recv_bytes(int socket, void* data, std::size_t bytes, std::vector<UniqueFd>& fds) {
  iovec body{.iov_base = data, .iov_len = bytes};
  alignas(cmsghdr) std::byte space[CMSG_SPACE(kMostDescriptors * sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &body;
  header.msg_iovlen = 1;
  header.msg_control = space;
  header.msg_controllen = sizeof(space);
  ssize_t received = -1;
  do {
    received = ::recvmsg(socket, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  } while (received < 0 && errno == EINTR);
  if (received < 0) return false;
  for (cmsghdr* control = CMSG_FIRSTHDR(&header); control != nullptr; control = CMSG_NXTHDR(&header, control)) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(control) + i * sizeof(int), sizeof(int));
      fds.emplace_back(fd);
    }
  }
  return received == static_cast<ssize_t>(bytes) && (header.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) == 0;
}

}  // namespace pycomm::host
