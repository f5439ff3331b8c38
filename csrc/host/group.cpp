#include "host/group.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "host/groups.hpp"

namespace pycomm::host {

Group::Group(std::string name, Membership members, std::shared_ptr<WaitGraph> graph)
    : name_(std::move(name)),
      members_(std::move(members)),
      segments_(members_),
      waiter_(members_, name_, &RankFlags::calls),
      graph_(std::move(graph)) {
  if (members_.tuning.strict != 0) {
    if (graph_ == nullptr) graph_ = std::make_shared<WaitGraph>(members_);
    world_ranks_ = graph_->ranks_of(members_.tokens);
  }
  enroll(*this);
}

Group::~Group() { dismiss(*this); }

std::byte* Group::symmetric_input(int rank) const {
  const Location& location = members_.control.slot(rank, seq_).locations.input;
  return location.symmetric() ? segments_.address(location, rank) : nullptr;
}

std::byte* Group::symmetric_output(int rank) const {
  const Location& location = members_.control.slot(rank, seq_).locations.output;
  return location.symmetric() ? segments_.address(location, rank) : nullptr;
}

std::byte* Group::payload(int rank, std::size_t bytes) const {
  CallSlot& slot = members_.control.slot(rank, seq_);
  return bytes <= sizeof(slot.payload) ? slot.payload : members_.control.staging(rank, seq_);
}

void Group::signal(std::uint64_t phase) {
  store_flag(members_.control.flags(rank()).step, (seq_ << kStepBits) | phase);
  waiter_.ring();
}

void Group::wait(std::uint64_t phase, int only) const {
  const std::uint64_t target = (seq_ << kStepBits) | phase;
  waiter_.wait(
      [&](int r) {
        return r == rank() || (only != kEveryRank && r != only) || load_flag(members_.control.flags(r).step) >= target;
      },
      context());
}

Meeting Group::meeting(const char* op, const Call& call) const {
  WaitContext here = context();
  here.call = call;
  const auto shown = std::make_shared<std::optional<ShownWait>>();
  const auto look = [this, here, shown](const std::vector<int>& missing) {
    waiter_.check([&](int r) { return std::ranges::find(missing, r) == missing.end(); }, here);
    if (!*shown) shown->emplace(ShownWait::Kind::kForRanks, &members_);
    (*shown)->show(waiter_.roots_of(missing));
  };
  const auto expire = [this, here](const std::vector<int>& missing) {
    waiter_.expire(missing, waiter_.roots_of(missing), here);
  };
  return {.op = op, .names = {}, .deadline = deadline_, .interrupt = interrupt_, .check = look, .expire = expire};
}

void Group::post(std::uint64_t& flag, std::uint64_t value) {
  check_usable();
  carry_on();
  if (!segments_.locate(&flag, sizeof(flag)).symmetric())
    throw std::invalid_argument("the flag is not symmetric memory");
  store_flag(flag, value);
  waiter_.ring();
}

void Group::wait_posted(const std::uint64_t& flag, std::uint64_t value, int only) {
  waiter_.check_aborted();
  const Location location = segments_.locate(&flag, sizeof(flag));
  if (!location.symmetric()) throw std::invalid_argument("the flag is not symmetric memory");
  call_ = Call{.kind = OpKind::kAwait, .count = value};
  std::vector<const std::uint64_t*> flags;
  for (int r = 0; r < world_size(); ++r) {
    flags.push_back(reinterpret_cast<const std::uint64_t*>(segments_.address(location, r)));
  }
  waiter_.wait(
      [&](int r) {
        return (only != kEveryRank && r != only) || load_flag(*flags[static_cast<std::size_t>(r)]) >= value;
      },
      context());
}

void Group::begin(const Call& call, const Locations& locations) {
  waiter_.check_aborted();
  call_ = call;
  ++seq_;
  CallSlot& slot = members_.control.slot(rank(), seq_);
  slot.call = call;
  slot.locations = locations;
  std::copy(issue_.begin(), issue_.end(), members_.control.flags(rank()).order[seq_ % 2]);
}

void Group::enter() {
  store_flag(members_.control.slot(rank(), seq_).seq, seq_);
  waiter_.ring();
  waiter_.wait([&](int r) { return load_flag(members_.control.slot(r, seq_).seq) >= seq_; }, context());
  entered_ = true;
  check_match();
  if (tuning().strict != 0) check_order();
}

void Group::check_match() const {
  bool equal = true;
  for (int r = 0; r < world_size(); ++r) equal &= members_.control.slot(r, seq_).call == call_;
  if (equal) return;
  Error error(ErrorKind::kMismatch, "");
  std::string text = "ranks of group '" + name_ + "' called different things as #" + std::to_string(seq_) + ":";
  for (int r = 0; r < world_size(); ++r) {
    error.calls.push_back(describe(members_.control.slot(r, seq_).call));
    text += (r == 0 ? " rank " : "; rank ") + std::to_string(r) + " " + error.calls.back();
  }
  Error named(ErrorKind::kMismatch, text + ". Nothing was written");
  named.calls = std::move(error.calls);
  throw named;
}

void Group::check_order() const {
  for (int a = 0; a < world_size(); ++a) {  // all pairs on every rank, so that all come to the same result
    for (int b = 0; b < a; ++b) {
      const std::uint32_t for_b = members_.control.flags(a).order[seq_ % 2][b];
      const std::uint32_t for_a = members_.control.flags(b).order[seq_ % 2][a];
      if (for_b == for_a) continue;
      throw Error(ErrorKind::kStrictOrder,
                  describe(call_) + " #" + std::to_string(seq_) + " of group '" + name_ + "' is call " +
                      std::to_string(for_a) + " between ranks " + std::to_string(b) + " and " + std::to_string(a) +
                      " for rank " + std::to_string(b) + ", but call " + std::to_string(for_b) + " for rank " +
                      std::to_string(a) +
                      ": all ranks must issue their calls, over all communicators, in one order, or NCCL hangs. "
                      "Nothing was written");
    }
  }
}

void Group::check_usable() const {
  if (!unusable_) return;
  const std::lock_guard lock(ending_);
  if (closed_) throw Error(ErrorKind::kGeneral, "communicator '" + name_ + "' is closed");
  Error again(failure_->kind, "communicator '" + name_ +
                                  "' cannot be used any more, since an earlier call failed: " + failure_->what());
  again.op = failure_->op;
  again.seq = failure_->seq;
  again.group = failure_->group;
  again.ranks = failure_->ranks;
  again.surfaced = failure_->surfaced;
  again.root = failure_->root;
  throw again;
}

void Group::show_root(const std::vector<std::uint64_t>& roots, const std::string& text) {
  RankFlags& mine = members_.control.flags(rank());
  const std::size_t number = std::min<std::size_t>(roots.size(), kMaxRanks);
  store_flag(mine.num_roots, 0u);
  std::copy_n(roots.begin(), number, mine.roots);
  put_text(mine.reason, text);
  store_flag(mine.num_roots, static_cast<std::uint32_t>(number));
}

/// An abort may follow another end, whose reason stays: peers may be reading it.
void Group::show_end(RankState state, const std::string& reason, const std::vector<std::uint64_t>& roots, bool aborts) {
  RankFlags& mine = members_.control.flags(rank());
  const bool is_first = !std::exchange(has_ended_, true);
  if (is_first && (!is_noted_ || !roots.empty())) {
    show_root(roots, reason);
  } else if (is_first && !reason.empty()) {  // the roots stay
    const std::string heard = text_in(mine.reason);
    put_text(mine.reason, reason.find(heard) != std::string::npos ? reason : reason + ", after a failure: " + heard);
  }
  if (aborts) store_flag(mine.aborted, 1u);  // before the state, so that it is never taken for a call that failed
  if (is_first) store_flag(mine.state, static_cast<std::uint32_t>(state));
  waiter_.ring();
}

void Group::fail(const Error& error) {
  {
    const std::lock_guard lock(ending_);
    if (failure_ != nullptr) return;
    failure_ = std::make_unique<Error>(error);
    unusable_ = true;
    segments_.quarantine();  // a stopped peer may wake up and write
    show_end(RankState::kFailed, error.root.text.empty() ? error.what() : error.root.text, error.root.processes);
  }
  if (!error.root.processes.empty()) tell_of(error.root);
}

void Group::note(const Root& root) {
  const std::lock_guard lock(ending_);
  if (has_ended_) return;
  show_root(root.processes, root.text);
  is_noted_ = true;
}

void Group::forget_note() {
  const std::lock_guard lock(ending_);
  if (has_ended_) return;
  show_root({}, "");
  is_noted_ = false;
}

void Group::show_activity(const std::string& what) {
  RankFlags& mine = members_.control.flags(rank());
  store_flag(mine.is_active, 0u);
  if (what.empty()) return;
  put_text(mine.activity, what);
  store_flag(mine.is_active, 1u);
}

std::string Group::running() const {
  const std::string number = call_.kind == OpKind::kAwait ? "" : " #" + std::to_string(seq_);
  return describe(call_) + number + " of group '" + name_ + "'";
}

void Group::abort(const std::string& reason) {
  RankFlags& mine = members_.control.flags(rank());
  {
    const std::lock_guard lock(ending_);
    if (closed_ || load_flag(mine.aborted) != 0) return;
    show_end(RankState::kFailed, reason, {}, true);
    if (mine.num_roots != 0) return;  // not of itself
  }
  const std::string name = std::to_string(rank());
  tell_of({{members_.tokens[static_cast<std::size_t>(rank())]},
           "rank " + name + " aborted: " + reason + " (group '" + name_ + "')"});
}

bool Group::aborted() const {
  for (int r = 0; r < world_size(); ++r) {
    if (load_flag(members_.control.flags(r).aborted) != 0) return true;
  }
  return false;
}

void Group::close(bool alone) {
  const std::lock_guard lock(ending_);
  if (closed_) return;
  closed_ = unusable_ = true;
  show_end(RankState::kClosed, "", {});
  if (alone) members_.sockets.clear();
}

void Entry::enter() {
  try {
    group_.enter();
  } catch (const Error& error) {
    // These end the call for everyone alike; anything else leaves it unfinished, and messages say so.
    if (Group::in_step(error.kind)) complete();
    throw;
  }
}

void Entry::complete() const { store_note(group_.members_.control.flags(group_.rank()).completed, group_.seq_); }

}  // namespace pycomm::host
