// The host transport's communicator: the calls of Python's Communicator over one Group, in issue order, synchronous on
// the calling thread or asynchronous on the progress thread. Pointers stay valid until the call (or its Work) is done.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "host/fork_guard.hpp"
#include "host/group.hpp"
#include "host/messenger.hpp"
#include "host/progress.hpp"
#include "host/turn.hpp"
#include "pycomm/backend.hpp"

namespace pycomm::host {

class Communicator final : public Backend {
 public:
  /// `timeout_s`: of calls that are not given one; here only remembered. `graph`: strict, and split from another.
  Communicator(std::string name, Membership members, double timeout_s, InterruptCheck interrupt,
               std::shared_ptr<WaitGraph> graph = nullptr);
  Communicator(const Communicator&) = delete;  // its thread holds its address
  Communicator& operator=(const Communicator&) = delete;
  ~Communicator() override;

  int rank() const override { return group_->rank(); }
  int world_size() const override { return group_->world_size(); }
  const std::string& name() const { return group_->name(); }
  /// The processes of the ranks, each the same in all its communicators.
  const std::vector<std::uint64_t>& tokens() const { return group_->members().tokens; }
  double timeout_s() const override { return timeout_s_; }
  const Tuning& tuning() const { return group_->tuning(); }

  std::shared_ptr<Work> submit(const Call& call, Operands&& operands, const CallOptions& options) override;
  /// A collective that no other back end has: `body` enters its call and moves the data (group.hpp).
  std::shared_ptr<Work> collective(std::function<void(Group&)> body, const CallOptions& options);

  /// Collective: a descriptor of every rank's, by rank, for other kinds of memory than ours; each takes this rank's
  /// `fd`, which stays the caller's.
  std::vector<UniqueFd> exchange_fds(int fd, double timeout_s);

  void send(const MessageSpec& spec, double timeout_s) override;
  int recv(const MessageSpec& spec, double timeout_s) override;
  std::vector<int> run_messages(const std::vector<MessageSpec>& specs, double timeout_s) override;
  std::shared_ptr<Work> start_messages(const std::vector<MessageSpec>& specs, double timeout_s) override;
  /// Receive from whoever has sent a message with this tag already; nullptr if nobody has.
  std::shared_ptr<Work> receive_arrived(const MessageSpec& spec, double timeout_s);
  /// Group::post and Group::wait_posted, on a flag of this rank's symmetric memory.
  void post(std::uint64_t& flag, std::uint64_t value);
  void wait_posted(const std::uint64_t& flag, std::uint64_t value, int only, double timeout_s);

  std::unique_ptr<SymmetricBuffer> empty(std::size_t bytes, double timeout_s);
  /// Every rank's row, one behind the other, by rank: equally long, matched as a call of `kind` with `count`.
  std::string agree(const std::string& row, OpKind kind, std::uint64_t count, double timeout_s);
  /// `rank`'s counterpart of a range of this rank's symmetric memory.
  std::unique_ptr<SymmetricBuffer> peer(const void* data, std::size_t bytes, int rank);
  bool is_symmetric(const void* data, std::size_t bytes) const;
  /// Ranks of equal color form a new communicator, ordered by (key, rank); nullptr where color is empty.
  std::unique_ptr<Communicator> split(std::optional<std::int64_t> color, std::int64_t key, double timeout_s);

  void abort(const std::string& reason);
  /// Finish what is queued or running, tell the peers, give up the sockets. What is not finished after `drain_s` is
  /// aborted. A call that the calling thread is inside of (inside.hpp) is aborted at once. Idempotent.
  void close(double drain_s) { leave(drain_s, interrupt_); }

 private:
  template <class Body>
  std::shared_ptr<Work> run(const CallOptions& options, Body body);
  void check_not_forked() const;
  /// Of every call: whether it may be issued.
  void check_open() const;
  void check_outside() const;
  void take_turn(const CallOptions& options);
  void leave(double drain_s, InterruptCheck interrupt);
  bool drain(double drain_s, InterruptCheck interrupt);
  void finish(bool has_turn);
  void give_up_in_child();

  double timeout_s_;
  InterruptCheck interrupt_;
  std::unique_ptr<Group> group_;
  std::unique_ptr<Progress> progress_;
  std::unique_ptr<Messenger> messenger_;
  Turn turn_;  // one collective at a time
  std::uint64_t num_splits_ = 0;
  std::uint64_t generation_;
  std::atomic<bool> closed_ = false;                      // or about to be: no new calls
  ForkGuard fork_guard_{[this] { give_up_in_child(); }};  // last: it touches the others
};

}  // namespace pycomm::host
