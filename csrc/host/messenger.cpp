// Matching and moving; waiting is in messenger_wait.cpp.
#include "host/messenger.hpp"

#include <algorithm>

#include "host/copy.hpp"

namespace pycomm::host {

namespace {

constexpr std::size_t kInPlaceChunk = 1 << 20;  // bytes copied under the lock at a time

bool is_active(const MessageSpec& spec, int peer) {
  return !spec.is_send && (spec.peer == peer || spec.peer == kAnySource);
}

}  // namespace

void Messenger::progress() {
  for (int peer = 0; peer < members_.world_size; ++peer) {
    send_to(peer);
    receive_from(peer);
  }
}

void Messenger::send_to(int peer) {
  Outgoing& outgoing = outgoing_[static_cast<std::size_t>(peer)];
  if (outgoing.queued.empty() && outgoing.offered.empty() && outgoing.streaming.empty()) return;
  const Channel channel = members_.control.channel(members_.rank, peer);
  post_offers(peer, outgoing, channel);
  read_replies(outgoing, channel);
  stream_out(peer, outgoing, channel);
}

/// The next offer of the channel, which has room for it.
Offer Messenger::put_offer(const Channel& channel, const MessageSpec& spec, std::uint64_t id) {
  const std::uint64_t number = channel.header().offered;  // only this rank writes it
  Offer offer;
  offer.id = id;
  offer.tag = spec.tag;
  offer.count = spec.count;
  offer.dtype = spec.dtype;
  if (spec.bytes() <= channel.sizes().eager_bytes) {
    if (spec.bytes() != 0) std::memcpy(channel.eager_data(number), spec.data, spec.bytes());
  } else {
    offer.location = group_.segments().locate(spec.data, spec.bytes());
    offer.transfer = offer.location.symmetric() ? Transfer::kInPlace : Transfer::kStreamed;
  }
  channel.offer(number) = offer;
  store_flag(channel.header().offered, number + 1);
  return offer;
}

/// An eager send is done when its bytes are in the channel, if nothing waits before it and the channel has room.
bool Messenger::send_at_once(const MessageSpec& spec) {
  const Channel channel = members_.control.channel(members_.rank, spec.peer);
  if (spec.bytes() > channel.sizes().eager_bytes || group_.tuning().strict != 0) return false;
  const std::lock_guard lock(mutex_);
  Outgoing& outgoing = outgoing_[static_cast<std::size_t>(spec.peer)];
  const Channel::Header& header = channel.header();
  if (!outgoing.queued.empty() || header.offered - load_flag(header.taken) >= Channel::kNumOffers) return false;
  ++num_posted_;
  put_offer(channel, spec, outgoing.next_id++);
  waiter_.ring(spec.peer);
  return true;
}

/// An eager message that fits and comes while this rank spins, if no other receive could be meant.
bool Messenger::recv_at_once(const MessageSpec& spec) {
  if (spec.peer == kAnySource || group_.tuning().strict != 0) return false;
  const Channel channel = members_.control.channel(spec.peer, members_.rank);
  Channel::Header& header = channel.header();
  if (!waiter_.spin([&] { return load_flag(header.offered) > load_flag(header.taken); })) return false;
  const std::lock_guard lock(mutex_);
  const std::uint64_t number = header.taken;
  if (!receives_.empty() || !incoming_[static_cast<std::size_t>(spec.peer)].arrived.empty()) return false;
  if (load_flag(header.offered) == number) return false;
  const Offer& offer = channel.offer(number);
  if (offer.transfer != Transfer::kEager || offer.tag != spec.tag || offer.count != spec.count ||
      offer.dtype != spec.dtype) {
    return false;
  }
  ++num_posted_;
  if (spec.bytes() != 0) std::memcpy(spec.data, channel.eager_data(number), spec.bytes());
  store_flag(header.taken, number + 1);
  waiter_.ring(spec.peer);  // it may wait for room
  return true;
}

void Messenger::post_offers(int peer, Outgoing& outgoing, const Channel& channel) {
  Channel::Header& header = channel.header();
  bool posted = false;
  while (!outgoing.queued.empty()) {
    const std::uint64_t number = header.offered;  // only this rank writes it
    if (number - load_flag(header.taken) >= Channel::kNumOffers) break;
    Message& message = *outgoing.queued.front();
    outgoing.queued.pop_front();
    message.id = outgoing.next_id++;
    const Offer offer = put_offer(channel, message.spec, message.id);
    posted = true;
    if (offer.transfer == Transfer::kEager && group_.tuning().strict == 0) {
      finish(message);
    } else {
      outgoing.offered.emplace(message.id, &message);
    }
  }
  if (posted) ring(peer);
}

void Messenger::read_replies(Outgoing& outgoing, const Channel& channel) {
  Channel::Header& header = channel.header();
  while (header.replies_read < load_flag(header.replied)) {
    const Reply reply = channel.reply(header.replies_read);
    store_flag(header.replies_read, header.replies_read + 1);
    if (group_.graph() != nullptr) group_.graph()->move();
    const auto found = outgoing.offered.find(reply.id);
    if (found == outgoing.offered.end()) continue;  // not strict: an eager send was done before
    Message& message = *found->second;
    outgoing.offered.erase(found);
    if (reply.kind == Reply::Kind::kSend) {
      message.matched = true;
      outgoing.streaming.push_back(&message);
    } else {
      finish(message, reply.kind == Reply::Kind::kMismatch ? mismatch(message, reply.count, reply.dtype) : nullptr);
    }
  }
}

void Messenger::stream_out(int peer, Outgoing& outgoing, const Channel& channel) {
  Channel::Header& header = channel.header();
  const std::uint64_t capacity = channel.sizes().stream_bytes;
  bool wrote = false;
  while (!outgoing.streaming.empty()) {
    Message& message = *outgoing.streaming.front();
    const std::uint64_t position = header.streamed;
    const std::uint64_t room = capacity - (position - load_flag(header.stream_read));
    // A quarter of the ring at a time, so that the receiver copies one chunk while the next is written.
    const std::size_t chunk =
        std::min<std::uint64_t>({room, capacity - position % capacity, capacity / 4, message.bytes() - message.moved});
    if (chunk == 0) break;
    std::memcpy(channel.stream(position), static_cast<std::byte*>(message.spec.data) + message.moved, chunk);
    message.moved += chunk;
    store_flag(header.streamed, position + chunk);
    wrote = true;
    ring(peer);
    if (message.moved < message.bytes()) continue;
    outgoing.streaming.pop_front();
    finish(message);
  }
  if (wrote) ring(peer);
}

void Messenger::ring(int peer) const {
  if (group_.graph() != nullptr) group_.graph()->move();
  waiter_.ring(peer);
}

void Messenger::receive_from(int peer) {
  Incoming& incoming = incoming_[static_cast<std::size_t>(peer)];
  const bool wanted = std::any_of(receives_.begin(), receives_.end(),
                                  [&](const Message* message) { return is_active(message->spec, peer); });
  if (!wanted && incoming.copying.empty() && incoming.streaming.empty() && incoming.replies.empty()) return;
  const Channel channel = members_.control.channel(peer, members_.rank);
  if (wanted) take_offers(peer, incoming, channel);
  copy_in_place(incoming);
  flush_replies(peer, incoming, channel);
  stream_in(peer, incoming, channel);
}

void Messenger::take_offers(int peer, Incoming& incoming, const Channel& channel) {
  Channel::Header& header = channel.header();
  bool took = false;
  while (header.taken < load_flag(header.offered)) {
    const std::uint64_t number = header.taken;
    const Offer offer = channel.offer(number);
    const std::byte* const eager = channel.eager_data(number);
    if (Message* const receive = find_receive(peer, offer.tag); receive != nullptr) {
      accept(peer, *receive, offer, eager);
    } else {
      Arrived arrived{.offer = offer, .bytes = {}};
      if (offer.transfer == Transfer::kEager) arrived.bytes.assign(eager, eager + offer.bytes());
      incoming.arrived.push_back(std::move(arrived));
    }
    store_flag(header.taken, number + 1);
    took = true;
  }
  if (took) ring(peer);
}

Messenger::Message* Messenger::find_receive(int peer, std::int64_t tag) {
  const auto found = std::find_if(receives_.begin(), receives_.end(), [&](const Message* message) {
    return is_active(message->spec, peer) && message->spec.tag == tag;
  });
  if (found == receives_.end()) return nullptr;
  Message* const receive = *found;
  receives_.erase(found);
  return receive;
}

bool Messenger::match_arrived(Message& receive) {
  for (int peer = 0; peer < members_.world_size; ++peer) {
    if (!is_active(receive.spec, peer)) continue;
    std::deque<Arrived>& arrived = incoming_[static_cast<std::size_t>(peer)].arrived;
    const auto found =
        std::find_if(arrived.begin(), arrived.end(), [&](const Arrived& a) { return a.offer.tag == receive.spec.tag; });
    if (found == arrived.end()) continue;
    const Arrived match = std::move(*found);
    arrived.erase(found);
    accept(peer, receive, match.offer, match.bytes.data());
    return true;
  }
  return false;
}

void Messenger::accept(int peer, Message& receive, const Offer& offer, const std::byte* eager) {
  Incoming& incoming = incoming_[static_cast<std::size_t>(peer)];
  receive.source = peer;
  receive.matched = true;
  receive.id = offer.id;
  Reply reply{.id = offer.id, .count = receive.spec.count, .dtype = receive.spec.dtype};
  if (offer.count != receive.spec.count || offer.dtype != receive.spec.dtype) {
    reply.kind = Reply::Kind::kMismatch;
    incoming.replies.push_back(reply);
    return finish(receive, mismatch(receive, offer.count, offer.dtype));
  }
  switch (offer.transfer) {
    case Transfer::kEager:
      if (receive.bytes() != 0) std::memcpy(receive.spec.data, eager, receive.bytes());
      if (group_.tuning().strict != 0) incoming.replies.push_back(reply);
      return finish(receive);
    case Transfer::kInPlace:
      receive.in_place = group_.segments().address(offer.location, peer);
      return incoming.copying.push_back(&receive);
    case Transfer::kStreamed:
      reply.kind = Reply::Kind::kSend;
      incoming.replies.push_back(reply);
      return incoming.streaming.push_back(&receive);
  }
}

void Messenger::copy_in_place(Incoming& incoming) {
  if (incoming.copying.empty()) return;
  Message& receive = *incoming.copying.front();
  const std::size_t chunk = std::min(kInPlaceChunk, receive.bytes() - receive.moved);
  copy(static_cast<std::byte*>(receive.spec.data) + receive.moved, receive.in_place + receive.moved, chunk,
       group_.message_around_caches(receive.bytes()));
  receive.moved += chunk;
  if (receive.moved < receive.bytes()) return ring(members_.rank);  // go on at once instead of sleeping now
  incoming.copying.pop_front();
  incoming.replies.push_back({.id = receive.id});
  finish(receive);
}

void Messenger::flush_replies(int peer, Incoming& incoming, const Channel& channel) {
  if (incoming.replies.empty()) return;
  Channel::Header& header = channel.header();
  bool replied = false;
  while (!incoming.replies.empty() && header.replied - load_flag(header.replies_read) < Channel::kNumReplies) {
    channel.reply(header.replied) = incoming.replies.front();
    incoming.replies.pop_front();
    store_flag(header.replied, header.replied + 1);
    replied = true;
  }
  if (replied) ring(peer);
}

void Messenger::stream_in(int peer, Incoming& incoming, const Channel& channel) {
  Channel::Header& header = channel.header();
  const std::uint64_t capacity = channel.sizes().stream_bytes;
  while (!incoming.streaming.empty()) {
    Message& receive = *incoming.streaming.front();
    const std::uint64_t position = header.stream_read;
    const std::size_t chunk = std::min<std::uint64_t>(
        {load_flag(header.streamed) - position, capacity - position % capacity, receive.bytes() - receive.moved});
    if (chunk == 0) return;
    copy(static_cast<std::byte*>(receive.spec.data) + receive.moved, channel.stream(position), chunk,
         group_.message_around_caches(receive.bytes()));
    receive.moved += chunk;
    store_flag(header.stream_read, position + chunk);
    ring(peer);
    if (receive.moved < receive.bytes()) continue;
    incoming.streaming.pop_front();
    finish(receive);
  }
}

std::unique_ptr<Error> Messenger::mismatch(const Message& mine, std::uint64_t count, DType dtype) const {
  const int peer = mine.spec.is_send ? mine.spec.peer : mine.source;
  const auto describe_side = [&](bool is_send, int other, std::uint64_t n, DType type) {
    return describe(Call{.kind = is_send ? OpKind::kSend : OpKind::kRecv,
                         .dtype = type,
                         .root = other,
                         .count = n,
                         .splits = static_cast<std::uint64_t>(mine.spec.tag)});
  };
  const std::string here = describe_side(mine.spec.is_send, peer, mine.spec.count, mine.spec.dtype);
  const std::string there = describe_side(!mine.spec.is_send, members_.rank, count, dtype);
  auto error = std::make_unique<Error>(
      ErrorKind::kMismatch, "ranks of group '" + group_.name() + "' disagree on a message: rank " +
                                std::to_string(members_.rank) + " called " + here + "; rank " + std::to_string(peer) +
                                " called " + there + ". Nothing was written");
  error->calls.resize(static_cast<std::size_t>(members_.world_size));
  error->calls[static_cast<std::size_t>(members_.rank)] = here;
  error->calls[static_cast<std::size_t>(peer)] = there;
  return error;
}

void Messenger::finish(Message& message, std::unique_ptr<Error> error) {
  Batch& batch = *message.batch;
  if (error != nullptr && batch.error == nullptr) batch.error = std::move(error);
  message.done = true;
  if (--batch.num_active != 0) return;
  waiter_.ring(members_.rank);  // whoever waits for it may sleep in another thread
  if (batch.work == nullptr) return;
  batch.work->finish(batch.error == nullptr ? nullptr : std::make_exception_ptr(*batch.error), message.source);
  // Last, since it may be the last owner: `batch` and `message` end here.
  asynchronous_.remove_if([&](const std::shared_ptr<Batch>& active) { return active.get() == &batch; });
  if (asynchronous_.empty()) changed_.notify_all();
}

}  // namespace pycomm::host
