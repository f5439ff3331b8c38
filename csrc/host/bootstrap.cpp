#include "host/bootstrap.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <string_view>

#include "host/issue_order.hpp"
#include "pycomm/error.hpp"

namespace pycomm::host {

namespace {

constexpr std::uint32_t kMagic = 0x79706d63;  // "cmpy"
constexpr auto kPollSlice = std::chrono::milliseconds(50);
constexpr auto kNewsAfterEnd = std::chrono::seconds(1);  // for the reason why a connection has ended
constexpr std::size_t kMostSilent = kMaxRanks;
constexpr int kMostAccepted = 64;  // before it is looked at those who speak

struct Hello {  // rank -> rank 0, with a pidfd of the sender
  std::uint32_t magic = kMagic;
  std::uint32_t protocol = kProtocolVersion;
  std::uint64_t key[2] = {};  // of the Invitation: whoever has another one was not told by this job
  std::uint64_t build = 0;
  std::int32_t world_size = 0;
  std::int32_t rank = 0;
  std::int32_t pid = 0;
  std::int32_t reserved = 0;
  std::uint64_t token = 0;
};

struct Welcome {  // rank 0 -> rank, with the control segment and all pidfds
  Hello leader;
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

/// Poll for one slice, or until the deadline.
void poll_slice(std::vector<pollfd>& entries, const Deadline& deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline.left());
  const auto slice = std::min<std::chrono::milliseconds>(left, kPollSlice);
  if (::poll(entries.data(), entries.size(), static_cast<int>(slice.count())) >= 0) return;
  if (errno != EINTR) throw_errno("poll");
  for (pollfd& entry : entries) entry.revents = 0;
}

/// True when readable, false when the deadline passed. `look` is called after every slice.
template <class Look>
bool wait_readable(const UniqueFd& socket, const Deadline& deadline, const Look& look) {
  while (true) {
    std::vector<pollfd> entries{{.fd = socket.get(), .events = POLLIN, .revents = 0}};
    poll_slice(entries, deadline);
    if (entries[0].revents != 0) return true;
    look();
    if (deadline.expired()) return false;
  }
}

Hello hello_of(const Invitation& invitation, int rank, int world_size) {
  Hello hello;
  std::copy(std::begin(invitation.key), std::end(invitation.key), hello.key);
  hello.build = build_id();
  hello.world_size = world_size;
  hello.rank = rank;
  hello.pid = ::getpid();
  hello.token = process_token();
  return hello;
}

/// Whether it comes from somebody who was invited by the same job.
bool invited(const Hello& mine, const Hello& theirs) {
  return theirs.magic == mine.magic && std::equal(std::begin(mine.key), std::end(mine.key), theirs.key);
}

/// Empty if the two fit together; otherwise what differs, naming both sides.
std::string difference(const Hello& mine, const Hello& theirs, const Meeting& meeting) {
  const auto both = [&](const char* what, auto a, auto b) {
    const auto name = [&](const Hello& hello) {
      const bool known = hello.rank >= 0 && hello.rank < mine.world_size;
      return "rank " + std::to_string(known ? meeting.name_of(hello.rank) : hello.rank);
    };
    return name(mine) + " has " + what + " " + std::to_string(a) + ", " + name(theirs) + " has " + std::to_string(b);
  };
  if (theirs.protocol != mine.protocol) return both("protocol version", mine.protocol, theirs.protocol);
  if (theirs.build != mine.build) return both("build", mine.build, theirs.build) + ": install one build for all ranks";
  if (theirs.world_size != mine.world_size) return both("world size", mine.world_size, theirs.world_size);
  return {};
}

Error failed(const Meeting& meeting, const std::string& what) {
  return {ErrorKind::kGeneral, std::string(meeting.op) + ": " + what};
}

[[noreturn]] void expire(std::vector<int> missing, const Meeting& meeting) {
  if (meeting.expire) meeting.expire(missing);
  std::string names;
  for (const int rank : missing) names += (names.empty() ? "" : ", ") + std::to_string(rank);
  Error error(ErrorKind::kTimeout, std::string(meeting.op) + ": rank(s) " + names + " did not come within " +
                                       std::to_string(meeting.deadline.timeout_s()) + " s");
  error.op = meeting.op;
  error.ranks = std::move(missing);
  throw error;
}

void look_at(const std::vector<int>& missing, const Meeting& meeting) {
  if (meeting.interrupt != nullptr) meeting.interrupt();
  if (meeting.check) meeting.check(missing);
}

/// Rank 0's reception. All connections are watched together, so that one that says nothing holds up nobody.
class Reception {
 public:
  Reception(Membership& members, const Listener& listener, const Meeting& meeting)
      : members_(members),
        listener_(listener),
        meeting_(meeting),
        mine_(hello_of(listener.invitation(), 0, members.world_size)) {}

  const Hello& greeting() const { return mine_; }

  /// Return once every rank has come.
  void receive_all() {
    auto next_look = Deadline::Clock::now() + kPollSlice;
    for (std::vector<int> missing = missing_ranks(); !missing.empty(); missing = missing_ranks()) {
      std::vector<pollfd> entries{{.fd = listener_.fd().get(), .events = POLLIN, .revents = 0}};
      for (const UniqueFd& socket : silent_) entries.push_back({.fd = socket.get(), .events = POLLIN, .revents = 0});
      poll_slice(entries, meeting_.deadline);
      for (std::size_t i = silent_.size(); i-- > 0;) {
        if (entries[i + 1].revents != 0) hear(i);
      }
      if (entries[0].revents != 0) accept_all();
      const auto now = Deadline::Clock::now();
      if (now < next_look) continue;
      next_look = now + kPollSlice;
      missing = missing_ranks();
      if (missing.empty()) return;
      look_at(missing, meeting_);
      if (meeting_.deadline.expired(now)) expire(std::move(missing), meeting_);
    }
  }

 private:
  std::vector<int> missing_ranks() const {
    std::vector<int> missing;
    for (int r = 1; r < members_.world_size; ++r) {
      if (!members_.sockets[static_cast<std::size_t>(r)]) missing.push_back(meeting_.name_of(r));
    }
    return missing;
  }

  void accept_all() {
    for (int i = 0; i < kMostAccepted; ++i) {
      UniqueFd socket(::accept4(listener_.fd().get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!socket) {
        if (errno == EAGAIN || errno == ECONNABORTED || errno == EINTR) return;
        throw_errno("accept of a rank of this host");
      }
      if (!same_user(socket)) continue;  // a stranger on this host: not ours to answer
      // A rank speaks at once, so the one that has been silent for longest is none.
      if (silent_.size() == kMostSilent) silent_.erase(silent_.begin());
      silent_.push_back(std::move(socket));
    }
  }

  /// Silent connection `index` has said something, or ended.
  void hear(std::size_t index) {
    UniqueFd socket = std::move(silent_[index]);
    silent_.erase(silent_.begin() + static_cast<std::ptrdiff_t>(index));
    Hello theirs;
    std::vector<UniqueFd> fds;
    if (!recv_message(socket, theirs, fds) || !invited(mine_, theirs)) return;  // not of this job
    std::string problem = difference(mine_, theirs, meeting_);
    const auto rank = static_cast<std::size_t>(theirs.rank);
    if (problem.empty() && (theirs.rank < 1 || theirs.rank >= members_.world_size || members_.sockets[rank])) {
      problem = "two processes say that they are rank " + std::to_string(theirs.rank);
    }
    if (problem.empty() && (fds.size() != 1 || !is_pidfd_of(fds[0].get(), peer_of(socket).pid))) {
      problem = "rank " + std::to_string(meeting_.name_of(theirs.rank)) + " did not send a pidfd of its process";
    }
    if (!problem.empty()) throw failed(meeting_, problem);
    members_.sockets[rank] = std::move(socket);
    members_.pidfds[rank] = std::move(fds[0]);
    members_.pids[rank] = theirs.pid;
    members_.tokens[rank] = theirs.token;
  }

  Membership& members_;
  const Listener& listener_;
  const Meeting& meeting_;
  Hello mine_;
  std::vector<UniqueFd> silent_;  // connections whose other end has not said who it is, oldest first
};

void lead(Membership& members, const Listener& listener, const Meeting& meeting) {
  Segment segment = Segment::create("pycomm-control", Control::bytes_for(members.world_size, members.tuning));
  Reception reception(members, listener, meeting);
  reception.receive_all();
  Welcome welcome{.leader = reception.greeting(), .tuning = members.tuning};
  std::vector<int> fds{segment.fd()};
  for (int r = 0; r < members.world_size; ++r) {
    fds.push_back(members.pidfds[r].get());
    welcome.pids[r] = members.pids[r];
    welcome.tokens[r] = members.tokens[r];
  }
  for (int r = 1; r < members.world_size; ++r) {
    try {
      send_message(members.sockets[r], welcome, fds);
    } catch (const Error&) {  // it has just ended; the first call tells everybody
    }
  }
  members.control = Control(std::move(segment), members.world_size, members.tuning);
}

/// Rank 0 has hung up: its own reason if it comes within a second, else just that.
[[noreturn]] void lost_leader(const Meeting& meeting, const char* what) {
  const int leader = meeting.name_of(0);
  const auto end = Deadline::Clock::now() + kNewsAfterEnd;
  do {
    look_at({leader}, meeting);
    ::poll(nullptr, 0, 10);
  } while (meeting.check && Deadline::Clock::now() < end);
  Error error(ErrorKind::kPeerLost, std::string(meeting.op) + ": rank " + std::to_string(leader) + " " + what +
                                        " before all ranks had met; its own error says why");
  error.ranks = {leader};
  throw error;
}

UniqueFd connect_to_leader(const Invitation& invitation, const Meeting& meeting) {
  while (true) {
    UniqueFd socket = connect_to(invitation.name);
    if (socket) {
      if (!same_user(socket)) throw failed(meeting, "rank 0's socket belongs to another user");
      return socket;
    }
    if (errno != EAGAIN) lost_leader(meeting, "stopped to listen");
    look_at({meeting.name_of(0)}, meeting);  // others, strangers perhaps, wait to be accepted
    if (meeting.deadline.expired()) expire({meeting.name_of(0)}, meeting);
    ::poll(nullptr, 0, 10);
  }
}

/// Check everything that rank 0 says before any of it is used; throws kGeneral.
void check_welcome(const Hello& mine, const Welcome& welcome, const std::vector<UniqueFd>& fds,
                   const Meeting& meeting) {
  std::string problem = invited(mine, welcome.leader) ? difference(mine, welcome.leader, meeting)
                                                      : "rank 0 has another key: it belongs to another job";
  if (problem.empty()) problem = unusable(welcome.tuning);
  if (problem.empty() && fds.size() != static_cast<std::size_t>(mine.world_size) + 1) {
    problem = std::to_string(fds.size()) + " descriptors of " + std::to_string(mine.world_size + 1) +
              " arrived; is the limit of open files (ulimit -n) too low?";
  }
  for (std::size_t r = 1; problem.empty() && r < fds.size(); ++r) {
    if (!is_pidfd_of(fds[r].get(), 0)) problem = "rank 0 sent something else than a pidfd of each rank";
  }
  if (!problem.empty()) throw failed(meeting, problem);
}

void follow(Membership& members, const std::string& address, const Meeting& meeting) {
  const Invitation invitation = Invitation::parse(address);
  UniqueFd socket = connect_to_leader(invitation, meeting);
  const Hello mine = hello_of(invitation, members.rank, members.world_size);
  const int pidfd = members.pidfds[members.rank].get();
  const std::vector<int> leader{meeting.name_of(0)};
  send_message(socket, mine, std::span(&pidfd, 1));
  const auto look = [&] {
    try {
      look_at(leader, meeting);
    } catch (const Error&) {  // rank 0 may have welcomed this rank, and left, since the last poll
      pollfd entry{.fd = socket.get(), .events = POLLIN, .revents = 0};
      if (::poll(&entry, 1, 0) <= 0) throw;
    }
  };
  if (!wait_readable(socket, meeting.deadline, look)) expire(leader, meeting);
  Welcome welcome;
  std::vector<UniqueFd> fds;
  if (!recv_message(socket, welcome, fds)) lost_leader(meeting, "gave up");
  check_welcome(mine, welcome, fds, meeting);
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

Listener::Listener() : invitation_(Invitation::random()), fd_(listen_at(invitation_.name)) {}

Membership meet(int rank, int world_size, const Listener* listener, const std::string& address, const Tuning& tuning,
                const Meeting& meeting) {
  if (world_size < 1 || world_size > kMaxRanks || rank < 0 || rank >= world_size) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " of world size " + std::to_string(world_size) +
                                ": the host transport takes 1 to " + std::to_string(kMaxRanks) + " ranks");
  }
  if (!meeting.names.empty() && meeting.names.size() != static_cast<std::size_t>(world_size)) {
    throw std::invalid_argument(std::to_string(meeting.names.size()) + " names for " + std::to_string(world_size) +
                                " ranks");
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
    lead(members, *listener, meeting);
  } else {
    follow(members, address, meeting);
  }
  return members;
}

void send_fd(const UniqueFd& socket, int fd, std::uint64_t id) {
  send_message(socket, Tagged{.id = id}, std::span(&fd, 1));
}

UniqueFd recv_fd(const UniqueFd& socket, int sender, std::uint64_t id, const Meeting& meeting) {
  const auto look = [&] { look_at({sender}, meeting); };
  if (!wait_readable(socket, meeting.deadline, look)) expire({sender}, meeting);
  Tagged tagged{.id = ~id};
  std::vector<UniqueFd> fds;
  const bool arrived = recv_message(socket, tagged, fds);
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
