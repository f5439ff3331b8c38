// Who drives progress(), and what ends a wait for messages.
#include <pthread.h>

#include <algorithm>
#include <csignal>

#include "host/messenger.hpp"

namespace pycomm::host {

namespace {

Call call_of(const MessageSpec& spec) {
  return {.kind = spec.is_send ? OpKind::kSend : OpKind::kRecv,
          .dtype = spec.dtype,
          .root = spec.peer,
          .count = spec.count,
          .splits = static_cast<std::uint64_t>(spec.tag)};
}

std::string describe_drain(const void*) { return "close()"; }

/// Whether all that the batch still waits for may come from any rank.
template <class Batch>
bool is_from_any(const Batch& batch) {
  return std::all_of(batch.messages.begin(), batch.messages.end(), [](const auto& message) {
    return message.done || (message.spec.peer == kAnySource && message.source == kAnySource);
  });
}

}  // namespace

Messenger::Messenger(Group& group, InterruptCheck interrupt)
    : group_(group),
      members_(group.members()),
      interrupt_(interrupt),
      waiter_(members_, group.name(), &RankFlags::messages),
      patient_waiter_(members_, group.name(), &RankFlags::messages),
      outgoing_(static_cast<std::size_t>(members_.world_size)),
      incoming_(static_cast<std::size_t>(members_.world_size)) {
  patient_waiter_.set_patient(true);
}

Messenger::~Messenger() { stop(); }

std::shared_ptr<Messenger::Batch> Messenger::make_batch(const std::vector<MessageSpec>& specs, double timeout_s) {
  begin();
  auto batch = std::make_shared<Batch>();
  batch->deadline = Deadline::after(timeout_s);
  batch->num_active = specs.size();
  batch->messages.resize(specs.size());
  for (std::size_t i = 0; i < specs.size(); ++i) {
    Message& message = batch->messages[i];
    message.spec = specs[i];
    message.batch = batch.get();
    if (specs[i].is_send) message.source = specs[i].peer;
  }
  if (!next_candidate(*batch, 0)) batch->candidate = members_.rank;
  return batch;
}

void Messenger::post(Batch& batch) {
  batch.seq = ++num_posted_;
  for (Message& message : batch.messages) {
    if (message.spec.is_send) {
      outgoing_[static_cast<std::size_t>(message.spec.peer)].queued.push_back(&message);
    } else if (!match_arrived(message)) {
      receives_.push_back(&message);
    }
  }
  progress();
}

void Messenger::begin() {
  group_.check_usable();
  waiter_.check_aborted();
  group_.carry_on();
  if (group_.graph() != nullptr) group_.graph()->issue();
}

void Messenger::send(const MessageSpec& spec, double timeout_s) {
  begin();
  if (!send_at_once(spec)) run({spec}, timeout_s);
}

int Messenger::recv(const MessageSpec& spec, double timeout_s) {
  begin();
  return recv_at_once(spec) ? spec.peer : run({spec}, timeout_s).front();
}

std::vector<int> Messenger::run(const std::vector<MessageSpec>& specs, double timeout_s) {
  const std::shared_ptr<Batch> batch = make_batch(specs, timeout_s);
  if (specs.empty()) return {};
  {
    const std::lock_guard lock(mutex_);
    synchronous_.push_back(batch);
    post(*batch);
  }
  wait(*batch, waiter_, interrupt_, false);
  {
    const std::lock_guard lock(mutex_);
    std::erase(synchronous_, batch);
    if (synchronous_.empty()) changed_.notify_all();  // drain() may wait for that
  }
  if (batch->error != nullptr) throw Error(*batch->error);
  std::vector<int> sources;
  for (const Message& message : batch->messages) sources.push_back(message.source);
  return sources;
}

std::shared_ptr<Work> Messenger::start(const std::vector<MessageSpec>& specs, double timeout_s) {
  const std::shared_ptr<Batch> batch = make_batch(specs, timeout_s);
  auto work = std::make_shared<Work>(&members_);
  batch->work = work;
  if (specs.empty()) {
    work->finish(nullptr);
    return work;
  }
  const std::lock_guard lock(mutex_);
  start(batch);
  return work;
}

std::shared_ptr<Work> Messenger::start_arrived(const MessageSpec& spec, double timeout_s) {
  const std::shared_ptr<Batch> batch = make_batch({spec}, timeout_s);
  batch->work = std::make_shared<Work>(&members_);
  const std::lock_guard lock(mutex_);
  if (!has_arrived(spec.tag)) return nullptr;
  start(batch);
  return batch->work;
}

void Messenger::start(const std::shared_ptr<Batch>& batch) {
  if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  if (group_.graph() != nullptr) batch->under_way = group_.graph()->start_async();
  asynchronous_.push_back(batch);
  ++num_started_;
  post(*batch);
  changed_.notify_all();
  waiter_.ring(members_.rank);  // the thread may sleep on the bell
}

/// Whether a message with this tag waits for a receive.
bool Messenger::has_arrived(std::int64_t tag) {
  for (int peer = 0; peer < members_.world_size; ++peer) {
    Incoming& incoming = incoming_[static_cast<std::size_t>(peer)];
    take_offers(peer, incoming, members_.control.channel(peer, members_.rank));
    const auto fits = [&](const Arrived& arrived) { return arrived.offer.tag == tag; };
    if (std::any_of(incoming.arrived.begin(), incoming.arrived.end(), fits)) return true;
  }
  return false;
}

/// Whether an active message of the batch needs `rank` to act.
bool Messenger::waits_for(const Batch& batch, int rank) const {
  return std::any_of(batch.messages.begin(), batch.messages.end(), [&](const Message& message) {
    if (message.done) return false;
    const bool any = message.spec.peer == kAnySource && message.source == kAnySource;
    const int peer = any ? batch.candidate : message.spec.peer == kAnySource ? message.source : message.spec.peer;
    return peer == rank;
  });
}

/// Whom this batch waits for, from any source all that may send; unless it expires and is asynchronous, all of those
/// that a caller waits for.
std::vector<int> Messenger::misses(const Batch& batch, bool expires) const {
  std::vector<bool> missing(static_cast<std::size_t>(members_.world_size));
  const auto add = [&](const Batch& waiting) {
    for (const Message& message : waiting.messages) {
      if (message.done) continue;
      const int peer = message.spec.peer != kAnySource ? message.spec.peer : message.source;
      for (int r = 0; r < members_.world_size; ++r) {
        if (r == peer || (peer == kAnySource && r != members_.rank)) missing[static_cast<std::size_t>(r)] = true;
      }
    }
  };
  if (expires || batch.work == nullptr) {
    add(batch);
  } else {
    for (const std::shared_ptr<Batch>& other : asynchronous_) {
      if (other->work->is_awaited()) add(*other);
    }
  }
  std::vector<int> ranks;
  for (int r = 0; r < members_.world_size; ++r) {
    if (missing[static_cast<std::size_t>(r)]) ranks.push_back(r);
  }
  return ranks;
}

/// What of the batch nobody has posted the other side of.
Needs Messenger::needs_of(const Batch& batch) const {
  Needs needs;
  for (const Message& message : batch.messages) {
    if (message.done || message.matched) continue;
    if (message.spec.peer != kAnySource) {
      needs.all.push_back(message.spec.peer);
      continue;
    }
    needs.any.clear();
    for (int r = 0; r < members_.world_size; ++r) {
      if (r != members_.rank) needs.any.push_back(r);
    }
  }
  return needs;
}

/// From any source: look for the loss of the next peer; false if there is none. Alone, a rank can only send to itself.
bool Messenger::next_candidate(Batch& batch, int from) const {
  const int next = from == members_.rank ? from + 1 : from;
  if (next >= members_.world_size) return false;
  batch.candidate = next;
  return true;
}

WaitContext Messenger::context(const Batch& batch, InterruptCheck interrupt, const std::function<Needs()>& needs,
                               const std::function<std::vector<int>(bool)>& misses) const {
  const auto active =
      std::find_if(batch.messages.begin(), batch.messages.end(), [](const Message& message) { return !message.done; });
  const Message& shown = active != batch.messages.end() ? *active : batch.messages.front();
  Watch watch;
  if (batch.work == nullptr) {
    watch = group_.watch();
    watch.needs = &needs;
  }
  return {group_.name(), batch.seq, call_of(shown.spec), batch.deadline, interrupt, watch, &misses};
}

/// Drive progress until the batch is done; where `until_changed`, at most until another is started.
void Messenger::wait(Batch& batch, const Waiter& waiter, InterruptCheck interrupt, bool until_changed) {
  std::unique_lock lock(mutex_);
  const std::uint64_t num_started = num_started_;
  const std::function<Needs()> needs = [&] {
    const std::lock_guard relock(mutex_);
    return needs_of(batch);
  };
  const std::function<std::vector<int>(bool)> misses = [&](bool expires) {
    const std::lock_guard relock(mutex_);
    return this->misses(batch, expires);
  };
  const WaitContext context = this->context(batch, interrupt, needs, misses);
  const auto ready = [&](int rank) {
    const std::lock_guard relock(mutex_);
    if (batch.num_active != 0) progress();
    return batch.num_active == 0 || !waits_for(batch, rank) ||
           (until_changed && (stopping_ || num_started != num_started_));
  };
  lock.unlock();
  while (true) {
    try {
      return waiter.wait(ready, context);
    } catch (const Error& error) {
      // From any source: the loss of one rank does not end it while another may send.
      if (error.kind == ErrorKind::kPeerLost && is_from_any(batch) && !group_.aborted() &&
          error.surfaced == std::vector<int>{batch.candidate}) {
        const std::lock_guard relock(mutex_);
        if (next_candidate(batch, batch.candidate + 1)) continue;
      }
      fail(error);
      throw;
    } catch (...) {  // Ctrl-C
      fail(Error(ErrorKind::kGeneral, "interrupted in " + describe(context.call)));
      throw;
    }
  }
}

/// The group cannot go on: no message will be touched again, since their owners may free the memory now.
void Messenger::fail(const Error& error) {
  group_.fail(error);
  const std::lock_guard lock(mutex_);
  drop_all(error);
}

void Messenger::drop_all(const Error& error) {
  for (Outgoing& outgoing : outgoing_) {
    outgoing.queued.clear();
    outgoing.offered.clear();
    outgoing.streaming.clear();
  }
  for (Incoming& incoming : incoming_) {
    incoming.copying.clear();
    incoming.streaming.clear();
  }
  receives_.clear();
  const auto end = [&](Batch& batch) {
    if (batch.error == nullptr) batch.error = std::make_unique<Error>(error);
    for (Message& message : batch.messages) message.done = true;
    batch.num_active = 0;
  };
  for (const std::shared_ptr<Batch>& batch : synchronous_) {
    if (batch->num_active != 0) end(*batch);
  }
  for (const std::shared_ptr<Batch>& batch : asynchronous_) {
    end(*batch);
    batch->work->finish(std::make_exception_ptr(*batch->error));
  }
  synchronous_.clear();
  asynchronous_.clear();
  changed_.notify_all();
  waiter_.ring(members_.rank);
}

void Messenger::loop() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  pthread_setname_np(pthread_self(), "pycomm-messages");
  while (true) {
    std::shared_ptr<Batch> next;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !asynchronous_.empty(); });
      if (stopping_) return;
      // The one whose deadline comes first; waiting for it drives all of them.
      next = *std::min_element(asynchronous_.begin(), asynchronous_.end(),
                               [](const auto& a, const auto& b) { return a->deadline.left() < b->deadline.left(); });
    }
    try {
      wait(*next, patient_waiter_, nullptr, true);
    } catch (const Error&) {  // fail() has ended every Work with it
    }
  }
}

bool Messenger::drain(double timeout_s, InterruptCheck interrupt) {
  std::unique_lock lock(mutex_);
  const Inside inside(&members_, Inside::Kind::kOther, &describe_drain, nullptr);
  return wait_in_slices(lock, changed_, Deadline::after(timeout_s), interrupting(interrupt),
                        [this] { return asynchronous_.empty() && synchronous_.empty(); });
}

void Messenger::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    try {
      waiter_.check_aborted();
      drop_all(Error(ErrorKind::kGeneral, "the communicator is closed"));
    } catch (const Error& aborted) {
      drop_all(aborted);
    }
  }
  changed_.notify_all();
  waiter_.ring(members_.rank);
  if (thread_.joinable()) thread_.join();
}

}  // namespace pycomm::host
