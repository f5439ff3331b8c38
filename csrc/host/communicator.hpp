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
#include "host/parts.hpp"
#include "host/progress.hpp"
#include "host/turn.hpp"

namespace pycomm::host {

struct CallOptions {
  double timeout_s = 600;
  bool async_op = false;
};

class Communicator {
 public:
  /// `timeout_s`: of calls that are not given one; here only remembered. `graph`: strict, and split from another.
  Communicator(std::string name, Membership members, double timeout_s, InterruptCheck interrupt,
               std::shared_ptr<WaitGraph> graph = nullptr);
  Communicator(const Communicator&) = delete;  // its thread holds its address
  Communicator& operator=(const Communicator&) = delete;
  ~Communicator();

  int rank() const { return group_->rank(); }
  int world_size() const { return group_->world_size(); }
  const std::string& name() const { return group_->name(); }
  /// The processes of the ranks, each the same in all its communicators.
  const std::vector<std::uint64_t>& tokens() const { return group_->members().tokens; }
  double timeout_s() const { return timeout_s_; }
  const Tuning& tuning() const { return group_->tuning(); }

  // Each returns a Work if asynchronous, nullptr otherwise, and throws std::invalid_argument before anything is sent.
  std::shared_ptr<Work> all_reduce(void* data, std::size_t count, DType dtype, ReduceOp op, const CallOptions& options);
  std::shared_ptr<Work> broadcast(void* data, std::size_t count, DType dtype, int root, const CallOptions& options);
  std::shared_ptr<Work> reduce(void* data, std::size_t count, DType dtype, ReduceOp op, int root,
                               const CallOptions& options);
  // Parts are one a rank. Those of the input, of the output, and of the tensor of the root.
  std::shared_ptr<Work> reduce_scatter(const Tensors& tensors, Parts parts, ReduceOp op, const CallOptions& options);
  std::shared_ptr<Work> all_gather(const Tensors& tensors, Parts parts, const CallOptions& options);
  std::shared_ptr<Work> gather(const Tensors& tensors, Parts parts, int root, const CallOptions& options);
  std::shared_ptr<Work> scatter(const Tensors& tensors, Parts parts, int root, const CallOptions& options);
  std::shared_ptr<Work> all_to_all(const Tensors& tensors, Parts parts, const CallOptions& options);
  std::shared_ptr<Work> all_to_all_by_splits(const Tensors& tensors, Parts output, Parts input,
                                             const CallOptions& options);
  std::shared_ptr<Work> barrier(const CallOptions& options);
  /// A collective that has no method here: `body` enters its call and moves the data (group.hpp).
  std::shared_ptr<Work> collective(std::function<void(Group&)> body, const CallOptions& options);

  /// Collective: a descriptor of every rank's, by rank, for other kinds of memory than ours; each takes this rank's
  /// `fd`, which stays the caller's.
  std::vector<UniqueFd> exchange_fds(int fd, double timeout_s);

  // Messages are independent of collectives; peers are ranks of the group, or kAnySource of a receive.
  void send(const MessageSpec& spec, double timeout_s);
  /// Returns the source.
  int recv(const MessageSpec& spec, double timeout_s);
  /// Messages that progress together. Returns their sources (a send's: its destination).
  std::vector<int> run_messages(const std::vector<MessageSpec>& specs, double timeout_s);
  std::shared_ptr<Work> start_messages(const std::vector<MessageSpec>& specs, double timeout_s);

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
  void check_root(int root) const;
  void check_parts(const Parts& parts) const;
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
