#include "host/bootstrap.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <span>

#include "host/issue_order.hpp"
#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

constexpr std::uint32_t kMagic = 0x79706d63;  // "cmpy"
constexpr auto kPollSlice = std::chrono::milliseconds(50);

struct Hello {  // rank -> rank 0, with a pidfd of the sender
  std::uint32_t magic = kMagic;
  std::uint32_t protocol = kProtocolVersion;
  std::uint64_t build = 0;
  std::int32_t world_size = 0;
  std::int32_t rank = 0;
  std::int32_t pid = 0;
  std::int32_t reserved = 0;
  std::uint64_t token = 0;
};

struct Welcome {  // rank 0 -> rank, with the control segment and all pidfds
  Hello leader;
  std::int32_t accepted = 0;
  std::int32_t reserved = 0;
  Tuning tuning;
  std::int32_t pids[kMaxRanks] = {};
  std::uint64_t tokens[kMaxRanks] = {};
};

struct Tagged {  // rank 0 -> rank, with one descriptor
  std::uint64_t id = 0;
};

UniqueFd own_pidfd() {
  UniqueFd fd(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)));
  if (!fd) throw_errno("pidfd_open (Linux 5.3 or newer is needed)");
  return fd;
}

socklen_t fill_address(sockaddr_un& address, const std::string& name) {
  const std::string path = "pycomm-" + name;
  address = {};
  address.sun_family = AF_UNIX;
  std::copy(path.begin(), path.end(), address.sun_path + 1);  // sun_path[0] == 0: the abstract namespace
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + path.size());
}

UniqueFd new_socket() {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd) throw_errno("socket(AF_UNIX)");
  return fd;
}

bool same_user(const UniqueFd& socket) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) throw_errno("SO_PEERCRED");
  return peer.uid == ::geteuid();
}

/// True when readable, false when the deadline passed.
bool wait_readable(int fd, const Deadline& deadline, InterruptCheck interrupt) {
  while (true) {
    pollfd entry{.fd = fd, .events = POLLIN, .revents = 0};
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline.left());
    const int ready =
        ::poll(&entry, 1, static_cast<int>(std::min<std::chrono::milliseconds>(left, kPollSlice).count()));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) throw_errno("poll");
    if (interrupt != nullptr) interrupt();
    if (deadline.expired()) return false;
  }
}

template <class Message>
void send_message(int socket, const Message& message, std::span<const int> fds) {
  iovec body{.iov_base = const_cast<Message*>(&message), .iov_len = sizeof(message)};
  alignas(cmsghdr) std::byte space[CMSG_SPACE((kMaxRanks + 1) * sizeof(int))] = {};
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

/// Receive exactly one Message and its descriptors; false at end of file or for a message of another size.
template <class Message>
bool recv_message(int socket, Message& message, std::vector<UniqueFd>& fds) {
  iovec body{.iov_base = &message, .iov_len = sizeof(message)};
  alignas(cmsghdr) std::byte space[CMSG_SPACE((kMaxRanks + 1) * sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &body;
  header.msg_iovlen = 1;
  header.msg_control = space;
  header.msg_controllen = sizeof(space);
  ssize_t received = -1;
  do {
    received = ::recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
  } while (received < 0 && errno == EINTR);
  for (cmsghdr* control = CMSG_FIRSTHDR(&header); control != nullptr; control = CMSG_NXTHDR(&header, control)) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(control) + i * sizeof(int), sizeof(int));
      fds.emplace_back(fd);
    }
  }
  return received == static_cast<ssize_t>(sizeof(message)) && (header.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) == 0;
}

Hello hello_of(int rank, int world_size) {
  Hello hello;
  hello.build = build_id();
  hello.world_size = world_size;
  hello.rank = rank;
  hello.pid = ::getpid();
  hello.token = process_token();
  return hello;
}

/// Empty if the two fit together; otherwise what differs, naming both sides.
std::string difference(const Hello& mine, const Hello& theirs) {
  const auto both = [&](const char* what, auto a, auto b) {
    return "rank " + std::to_string(mine.rank) + " has " + what + " " + std::to_string(a) + ", rank " +
           std::to_string(theirs.rank) + " has " + std::to_string(b);
  };
  if (theirs.magic != mine.magic) return "a process that does not speak pycomm's protocol connected";
  if (theirs.protocol != mine.protocol) return both("protocol version", mine.protocol, theirs.protocol);
  if (theirs.build != mine.build) return both("build", mine.build, theirs.build) + ": install one build for all ranks";
  if (theirs.world_size != mine.world_size) return both("world size", mine.world_size, theirs.world_size);
  return {};
}

Error timeout_error(std::vector<int> missing, const Deadline& deadline, const char* op = "init") {
  std::string names;
  for (const int rank : missing) names += (names.empty() ? "" : ", ") + std::to_string(rank);
  Error error(ErrorKind::kTimeout, std::string(op) + ": rank(s) " + names + " did not come within " +
                                       std::to_string(deadline.timeout_s()) + " s");
  error.op = op;
  error.ranks = std::move(missing);
  return error;
}

void accept_ranks(Membership& members, const Listener& listener, const Hello& mine, const Deadline& deadline,
                  InterruptCheck interrupt) {
  for (int connected = 1; connected < members.world_size;) {
    UniqueFd socket;
    if (wait_readable(listener.fd().get(), deadline, interrupt)) {
      socket = UniqueFd(::accept4(listener.fd().get(), nullptr, nullptr, SOCK_CLOEXEC));
    }
    if (!socket || !wait_readable(socket.get(), deadline, interrupt)) {
      std::vector<int> missing;
      for (int r = 1; r < members.world_size; ++r) {
        if (!members.sockets[r]) missing.push_back(r);
      }
      throw timeout_error(std::move(missing), deadline);
    }
    if (!same_user(socket)) continue;  // a stranger on this host: not ours to answer
    Hello theirs;
    std::vector<UniqueFd> fds;
    if (!recv_message(socket.get(), theirs, fds) || fds.size() != 1) continue;
    std::string problem = difference(mine, theirs);
    if (problem.empty() && (theirs.rank < 1 || theirs.rank >= members.world_size || members.sockets[theirs.rank])) {
      problem = "two processes say that they are rank " + std::to_string(theirs.rank);
    }
    if (!problem.empty()) {
      send_message(socket.get(), Welcome{.leader = mine, .tuning = members.tuning}, {});
      throw Error(ErrorKind::kGeneral, "init: " + problem);
    }
    members.sockets[theirs.rank] = std::move(socket);
    members.pidfds[theirs.rank] = std::move(fds[0]);
    members.pids[theirs.rank] = theirs.pid;
    members.tokens[theirs.rank] = theirs.token;
    ++connected;
  }
}

void lead(Membership& members, const Listener& listener, const Deadline& deadline, InterruptCheck interrupt) {
  const Hello mine = hello_of(0, members.world_size);
  Segment segment = Segment::create("pycomm-control", Control::bytes_for(members.world_size, members.tuning));
  accept_ranks(members, listener, mine, deadline, interrupt);
  Welcome welcome{.leader = mine, .accepted = 1, .tuning = members.tuning};
  std::vector<int> fds{segment.fd()};
  for (int r = 0; r < members.world_size; ++r) {
    fds.push_back(members.pidfds[r].get());
    welcome.pids[r] = members.pids[r];
    welcome.tokens[r] = members.tokens[r];
  }
  for (int r = 1; r < members.world_size; ++r) send_message(members.sockets[r].get(), welcome, fds);
  members.control = Control(std::move(segment), members.world_size, members.tuning);
}

void follow(Membership& members, const std::string& address, const Deadline& deadline, InterruptCheck interrupt) {
  UniqueFd socket = new_socket();
  sockaddr_un name;
  const socklen_t size = fill_address(name, address);
  if (::connect(socket.get(), reinterpret_cast<sockaddr*>(&name), size) != 0) {
    throw_errno("connecting to rank 0 of this host");
  }
  if (!same_user(socket)) throw Error(ErrorKind::kGeneral, "init: rank 0's socket belongs to another user");
  const Hello mine = hello_of(members.rank, members.world_size);
  const int pidfd = members.pidfds[members.rank].get();
  send_message(socket.get(), mine, std::span(&pidfd, 1));
  if (!wait_readable(socket.get(), deadline, interrupt)) throw timeout_error({0}, deadline);
  Welcome welcome;
  std::vector<UniqueFd> fds;
  if (!recv_message(socket.get(), welcome, fds)) {
    Error error(ErrorKind::kPeerLost, "init: rank 0 gave up before all ranks had met; its own error says why");
    error.ranks = {0};
    throw error;
  }
  std::string problem = difference(mine, welcome.leader);
  if (problem.empty() && welcome.accepted == 0) {
    problem = "rank 0 refused rank " + std::to_string(mine.rank) + ": another process has that rank";
  }
  if (!problem.empty()) throw Error(ErrorKind::kGeneral, "init: " + problem);
  if (fds.size() != static_cast<std::size_t>(members.world_size) + 1) {
    throw Error(ErrorKind::kGeneral, "init: " + std::to_string(fds.size()) + " descriptors of " +
                                         std::to_string(members.world_size + 1) +
                                         " arrived; is the limit of open files (ulimit -n) too low?");
  }
  members.tuning = welcome.tuning;
  members.control = Control(Segment::attach(std::move(fds[0]), Control::bytes_for(members.world_size, members.tuning)),
                            members.world_size, members.tuning);
  for (int r = 0; r < members.world_size; ++r) {
    members.pidfds[r] = std::move(fds[static_cast<std::size_t>(r) + 1]);
    members.pids[r] = welcome.pids[r];
    members.tokens[r] = welcome.tokens[r];
  }
  members.sockets[0] = std::move(socket);
}

}  // namespace

Listener::Listener() : fd_(new_socket()) {
  std::uint8_t random[16];
  fill_random(random, sizeof(random));
  constexpr char kHex[] = "0123456789abcdef";
  for (const std::uint8_t byte : random) {
    address_ += kHex[byte >> 4];
    address_ += kHex[byte & 15];
  }
  sockaddr_un name;
  const socklen_t size = fill_address(name, address_);
  if (::bind(fd_.get(), reinterpret_cast<sockaddr*>(&name), size) != 0) throw_errno("bind of an abstract socket");
  if (::listen(fd_.get(), kMaxRanks) != 0) throw_errno("listen");
}

Membership meet(int rank, int world_size, const Listener* listener, const std::string& address, const Tuning& tuning,
                const Deadline& deadline, InterruptCheck interrupt) {
  if (world_size < 1 || world_size > kMaxRanks || rank < 0 || rank >= world_size) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " of world size " + std::to_string(world_size) +
                                ": the host transport takes 1 to " + std::to_string(kMaxRanks) + " ranks");
  }
  Membership members;
  members.rank = rank;
  members.world_size = world_size;
  members.tuning = tuning;
  members.sockets.resize(static_cast<std::size_t>(world_size));
  members.pidfds.resize(static_cast<std::size_t>(world_size));
  members.pids.resize(static_cast<std::size_t>(world_size), 0);
  members.tokens.resize(static_cast<std::size_t>(world_size), 0);
  members.tokens[rank] = process_token();
  members.pidfds[rank] = own_pidfd();
  members.pids[rank] = ::getpid();
  if (world_size == 1) {
    members.control = Control(Segment::create("pycomm-control", Control::bytes_for(1, tuning)), 1, tuning);
  } else if (rank == 0) {
    if (listener == nullptr) throw std::invalid_argument("rank 0 needs a Listener");
    lead(members, *listener, deadline, interrupt);
  } else {
    follow(members, address, deadline, interrupt);
  }
  return members;
}

void send_fd(const UniqueFd& socket, int fd, std::uint64_t id) {
  send_message(socket.get(), Tagged{.id = id}, std::span(&fd, 1));
}

UniqueFd recv_fd(const UniqueFd& socket, int sender, std::uint64_t id, const Deadline& deadline,
                 InterruptCheck interrupt) {
  if (!wait_readable(socket.get(), deadline, interrupt)) throw timeout_error({sender}, deadline, "passing memory");
  Tagged tagged{.id = ~id};
  std::vector<UniqueFd> fds;
  const bool arrived = recv_message(socket.get(), tagged, fds);
  if (!arrived && fds.empty() && tagged.id == id) {
    errno = EMFILE;  // the message came, and its descriptor found no room
    throw_errno("receiving a descriptor");
  }
  if (!arrived || fds.size() != 1 || tagged.id != id) {
    throw Error(ErrorKind::kGeneral,
                "rank " + std::to_string(sender) + " sent something else than memory " + std::to_string(id));
  }
  return std::move(fds[0]);
}

}  // namespace pycomm::host
