#include "host/communicator.hpp"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <limits>

#include "host/agree.hpp"
#include "host/collectives.hpp"
#include "host/issue_order.hpp"

namespace pycomm::host {

namespace {

constexpr double kNoLimit = std::numeric_limits<double>::infinity();
constexpr double kEndS = 2;  // in which a call ends once it is aborted

struct SplitChoice {
  std::int64_t color = 0;
  std::int64_t key = 0;
  bool member = false;
};

struct SplitAddress {
  std::array<char, Invitation::kHexDigits> text{};
};

/// The parent's ranks of one color, in the order of the new group.
std::vector<int> members_of(const std::vector<SplitChoice>& choices, std::int64_t color) {
  std::vector<int> ranks;
  for (int r = 0; r < static_cast<int>(choices.size()); ++r) {
    const SplitChoice& choice = choices[static_cast<std::size_t>(r)];
    if (choice.member && choice.color == color) ranks.push_back(r);
  }
  std::stable_sort(ranks.begin(), ranks.end(), [&](int a, int b) {
    return choices[static_cast<std::size_t>(a)].key < choices[static_cast<std::size_t>(b)].key;
  });
  return ranks;
}

}  // namespace

Communicator::Communicator(std::string name, Membership members, double timeout_s, InterruptCheck interrupt,
                           std::shared_ptr<WaitGraph> graph)
    : timeout_s_(timeout_s),
      interrupt_(interrupt),
      group_(std::make_unique<Group>(std::move(name), std::move(members), std::move(graph))),
      progress_(std::make_unique<Progress>(&group_->members())),
      messenger_(std::make_unique<Messenger>(*group_, interrupt)),
      generation_(fork_generation()) {}

Communicator::~Communicator() {
  leave(kNoLimit, nullptr);
  // In a forked child the group's flags are the parent's: leave them alone.
  if (generation_ != fork_generation()) static_cast<void>(group_.release());
}

void Communicator::give_up_in_child() {
  // Their threads were not forked; joining or destroying them would end the process.
  static_cast<void>(progress_.release());
  static_cast<void>(messenger_.release());
  group_->members().sockets.clear();
  group_->members().pidfds.clear();
}

void Communicator::check_not_forked() const {
  if (generation_ != fork_generation()) {
    throw Error(ErrorKind::kGeneral, "communicator '" + group_->name() +
                                         "' belongs to the parent of this forked process: call pycomm.init() here");
  }
}

void Communicator::check_open() const {
  check_not_forked();
  if (closed_.load(std::memory_order_relaxed)) {
    throw Error(ErrorKind::kGeneral, "communicator '" + group_->name() + "' is closed");
  }
}

void Communicator::check_outside() const {
  if (turn_.is_taken()) Inside::check_outside(&group_->members(), rank());
}

void Communicator::take_turn(const CallOptions& options) {
  if (turn_.try_take()) return;
  const Inside waiting(
      &group_->members(), Inside::Kind::kOther, [](const void*) { return std::string("a wait for its turn"); },
      nullptr);
  const InterruptCheck interrupt = options.async_op ? nullptr : interrupt_;
  const auto check = [&] {
    if (interrupt != nullptr) interrupt();
    group_->waiter().check_aborted();
  };
  // An asynchronous call's deadline counts from its start: what is before it has one of its own.
  if (turn_.take(Deadline::after(options.async_op ? kNoLimit : options.timeout_s), check)) return;
  Error error(ErrorKind::kTimeout, "rank " + std::to_string(rank()) + ": another thread is inside " +
                                       group_->running() + ", and was not done within " + seconds(options.timeout_s));
  error.group = group_->name();
  throw error;
}

template <class Body>
std::shared_ptr<Work> Communicator::run(const CallOptions& options, Body body) {
  check_open();
  check_outside();
  std::vector<std::uint32_t> issue;
  std::shared_ptr<void> under_way;
  if (const auto& graph = group_->graph(); graph != nullptr) {
    issue = next_issue(group_->members().tokens);
    graph->issue();
    if (options.async_op) under_way = graph->start_async();
  }
  if (options.async_op) {
    return progress_->submit([this, options, issue = std::move(issue), under_way, body = std::move(body)]() mutable {
      take_turn(options);
      const Turn::Holder turn(turn_);
      group_->set_patient(true);
      group_->run(options.timeout_s, nullptr, std::move(issue), body);
    });
  }
  if (progress_->busy()) progress_->drain(kNoLimit, interrupt_);  // issue order; each of those has its own deadline
  take_turn(options);
  const Turn::Holder turn(turn_);
  group_->set_patient(false);
  group_->run(options.timeout_s, interrupt_, std::move(issue), body);
  return nullptr;
}

std::shared_ptr<Work> Communicator::submit(const Call& call, Operands&& operands, const CallOptions& options) {
  if (!options.async_op) return run(options, [&](Group& group) { host::collective(group, call, operands); });
  return run(options,
             [call, operands = std::move(operands)](Group& group) { host::collective(group, call, operands); });
}

std::shared_ptr<Work> Communicator::collective(std::function<void(Group&)> body, const CallOptions& options) {
  return run(options, std::move(body));
}

std::vector<UniqueFd> Communicator::exchange_fds(int fd, double timeout_s) {
  std::vector<UniqueFd> fds(static_cast<std::size_t>(world_size()));
  run({.timeout_s = timeout_s}, [&](Group& group) {
    // Rank 0 has a socket to every rank, the others to rank 0 only: what comes from one is passed on to all.
    const auto& sockets = group.members().sockets;
    const Meeting meeting = group.meeting("passing memory", {.kind = OpKind::kAgree});
    host::agree(group, group.rank());
    if (group.rank() != 0) send_fd(sockets[0], fd, static_cast<std::uint64_t>(group.rank()));
    for (std::size_t owner = 0; owner < fds.size(); ++owner) {
      if (static_cast<int>(owner) == group.rank()) {
        fds[owner] = UniqueFd(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
        if (!fds[owner]) throw_errno("duplicating a descriptor");
      } else {
        const std::size_t sender = group.rank() == 0 ? owner : 0;
        fds[owner] = recv_fd(sockets[sender], static_cast<int>(sender), owner, meeting);
      }
      if (group.rank() != 0) continue;
      for (std::size_t peer = 1; peer < fds.size(); ++peer) {
        if (peer != owner) send_fd(sockets[peer], fds[owner].get(), owner);
      }
    }
    host::agree(group, group.rank());
  });
  return fds;
}

void Communicator::send(const MessageSpec& spec, double timeout_s) {
  check_open();
  messenger_->send(spec, timeout_s);
}

int Communicator::recv(const MessageSpec& spec, double timeout_s) {
  check_open();
  return messenger_->recv(spec, timeout_s);
}

std::vector<int> Communicator::run_messages(const std::vector<MessageSpec>& specs, double timeout_s) {
  check_open();
  return messenger_->run(specs, timeout_s);
}

std::shared_ptr<Work> Communicator::start_messages(const std::vector<MessageSpec>& specs, double timeout_s) {
  check_open();
  return messenger_->start(specs, timeout_s);
}

std::shared_ptr<Work> Communicator::receive_arrived(const MessageSpec& spec, double timeout_s) {
  check_open();
  return messenger_->start_arrived(spec, timeout_s);
}

void Communicator::post(std::uint64_t& flag, std::uint64_t value) {
  check_open();
  group_->post(flag, value);
}

void Communicator::wait_posted(const std::uint64_t& flag, std::uint64_t value, int only, double timeout_s) {
  check_open();
  check_outside();
  if (progress_->busy()) progress_->drain(kNoLimit, interrupt_);
  take_turn({.timeout_s = timeout_s});
  const Turn::Holder turn(turn_);
  group_->set_patient(false);
  group_->run(timeout_s, interrupt_, {}, [&](Group& group) { group.wait_posted(flag, value, only); });
}

std::unique_ptr<SymmetricBuffer> Communicator::empty(std::size_t bytes, double timeout_s) {
  std::unique_ptr<SymmetricBuffer> buffer;
  run({.timeout_s = timeout_s}, [&](Group& group) { buffer = group.segments().allocate(group, bytes); });
  return buffer;
}

std::string Communicator::agree(const std::string& row, OpKind kind, std::uint64_t count, double timeout_s) {
  std::string rows;
  run({.timeout_s = timeout_s}, [&](Group& group) {
    const Call call{.kind = kind, .count = count, .splits = row.size()};
    const std::vector<char> all = host::agree(group, call, row.data(), row.size());
    rows.assign(all.begin(), all.end());
  });
  return rows;
}

std::unique_ptr<SymmetricBuffer> Communicator::peer(const void* data, std::size_t bytes, int rank) {
  check_open();
  if (rank < 0 || rank >= world_size()) throw std::invalid_argument("no rank " + std::to_string(rank));
  return group_->segments().peer(data, bytes, rank);
}

bool Communicator::is_symmetric(const void* data, std::size_t bytes) const {
  return group_->segments().locate(data, bytes).symmetric();
}

std::unique_ptr<Communicator> Communicator::split(std::optional<std::int64_t> color, std::int64_t key,
                                                  double timeout_s) {
  std::unique_ptr<Communicator> result;
  run({.timeout_s = timeout_s}, [&](Group& group) {
    {
      const Entry entry(group, Call{.kind = OpKind::kSplit});
    }
    const auto choices =
        host::agree(group, SplitChoice{.color = color.value_or(0), .key = key, .member = color.has_value()});
    const std::vector<int> ranks = color ? members_of(choices, *color) : std::vector<int>{};
    const bool leads = !ranks.empty() && ranks.front() == group.rank();
    std::optional<Listener> listener;
    SplitAddress mine;
    if (leads) {
      listener.emplace();
      const std::string address = listener->address();
      std::copy(address.begin(), address.end(), mine.text.begin());
    }
    const auto addresses = host::agree(group, mine);
    const std::string suffix = "." + std::to_string(num_splits_++);
    if (!color) return;
    const SplitAddress& address = addresses[static_cast<std::size_t>(ranks.front())];
    const auto rank = std::find(ranks.begin(), ranks.end(), group.rank()) - ranks.begin();
    Meeting meeting = group.meeting("split", {.kind = OpKind::kSplit});
    meeting.names = ranks;
    Membership members = meet(static_cast<int>(rank), static_cast<int>(ranks.size()), leads ? &*listener : nullptr,
                              std::string(address.text.begin(), address.text.end()), group.tuning(), meeting);
    result = std::make_unique<Communicator>(group.name() + suffix + "[" + std::to_string(*color) + "]",
                                            std::move(members), timeout_s_, interrupt_, group.graph());
  });
  return result;
}

void Communicator::abort(const std::string& reason) {
  check_not_forked();
  group_->abort(reason);
}

bool Communicator::drain(double drain_s, InterruptCheck interrupt) {
  const Deadline deadline = Deadline::after(drain_s);
  const auto left_s = [&] { return std::chrono::duration<double>(deadline.left()).count(); };
  return progress_->drain(left_s(), interrupt) && messenger_->drain(left_s(), interrupt) &&
         turn_.take(deadline, interrupting(interrupt));
}

void Communicator::finish(bool has_turn) {
  progress_->stop();
  messenger_->stop();
  group_->close(has_turn);
  if (has_turn) turn_.give_back();
}

void Communicator::leave(double drain_s, InterruptCheck interrupt) {
  if (generation_ != fork_generation() || closed_.exchange(true)) return;
  if (const Inside* const inside = Inside::find(&group_->members()); inside != nullptr) {
    group_->abort("closed inside " + inside->what());
    return finish(inside->kind() != Inside::Kind::kCollective && turn_.take(Deadline::after(kEndS), [] {}));
  }
  bool has_turn = false;
  try {
    has_turn = drain(drain_s, interrupt);
  } catch (...) {  // Ctrl-C
    group_->abort("closed by an interrupt with operations under way");
    finish(turn_.take(Deadline::after(kEndS), [] {}));
    throw;
  }
  if (!has_turn) {
    group_->abort("closed with operations that no peer had joined after " + seconds(drain_s));
    has_turn = turn_.take(Deadline::after(kEndS), [] {});
  }
  finish(has_turn);
}

}  // namespace pycomm::host
