// Point-to-point messages of a communicator: FIFO per (peer, direction, tag), independent of collectives.
//
// A send becomes an offer in the channel to its receiver. A receive takes offers in order and keeps those that it is
// not looking for, so a tag never blocks another. How the bytes travel (channel.hpp):
//   eager      small: with the offer; the sender is done at once (strict: when the receiver has it)       2 copies
//   in place   from symmetric memory: the receiver copies them from there and replies                   1 copy
//   streamed   from ordinary memory: once a receive matches, chunk by chunk through the channel's ring   2 copies,
//   overlapped
//
// progress() advances every active message of this rank; whoever waits calls it: the callers of synchronous messages,
// and one thread for asynchronous ones, started on first use. All state is under one mutex.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "host/channel.hpp"
#include "host/group.hpp"
#include "host/progress.hpp"
#include "pycomm/backend.hpp"

namespace pycomm::host {

class Messenger {
 public:
  Messenger(Group& group, InterruptCheck interrupt);
  Messenger(const Messenger&) = delete;  // its thread holds its address
  Messenger& operator=(const Messenger&) = delete;
  ~Messenger();

  /// One message. Small ones take a short way where nothing else is under way.
  void send(const MessageSpec& spec, double timeout_s);
  int recv(const MessageSpec& spec, double timeout_s);
  /// Post messages that progress together and wait for all; returns their sources (a send's: its destination).
  std::vector<int> run(const std::vector<MessageSpec>& specs, double timeout_s);
  /// Post them and return at once.
  std::shared_ptr<Work> start(const std::vector<MessageSpec>& specs, double timeout_s);
  /// Receive from whoever has sent a message with this tag already; nullptr if nobody has.
  std::shared_ptr<Work> start_arrived(const MessageSpec& spec, double timeout_s);
  /// Return once no message is active; false if `timeout_s` passes before.
  bool drain(double timeout_s, InterruptCheck interrupt);
  /// Join the thread; the group must have failed, or nothing be active. Idempotent.
  void stop();

 private:
  struct Batch;
  struct Message {
    MessageSpec spec;
    Batch* batch = nullptr;
    std::uint64_t id = 0;     // a send's number to its receiver; a matched receive's likewise
    std::size_t moved = 0;    // bytes
    int source = kAnySource;  // of a matched receive
    const std::byte* in_place = nullptr;
    bool matched = false;  // the other side has posted it, too, as far as is known here
    bool done = false;

    std::size_t bytes() const { return spec.bytes(); }
  };
  /// Messages that were posted together and are waited for together.
  struct Batch {
    std::vector<Message> messages;
    std::size_t num_active = 0;
    std::unique_ptr<Error> error;
    std::shared_ptr<Work> work;  // asynchronous
    std::shared_ptr<void> under_way;
    int candidate = 0;  // from any source: the rank whose loss is looked for at present
    Deadline deadline = Deadline::after(0);
    std::uint64_t seq = 0;
  };
  struct Arrived {  // an offer that no receive has matched
    Offer offer;
    std::vector<std::byte> bytes;  // eager
  };
  struct Outgoing {
    std::uint64_t next_id = 0;
    std::deque<Message*> queued;                          // no room for their offers yet
    std::unordered_map<std::uint64_t, Message*> offered;  // wait for a reply
    std::deque<Message*> streaming;                       // in the order in which they were asked for
  };
  struct Incoming {
    std::deque<Arrived> arrived;
    std::deque<Message*> copying;    // in place, one after the other
    std::deque<Message*> streaming;  // in the order in which they were asked for
    std::deque<Reply> replies;       // no room yet
  };

  std::shared_ptr<Batch> make_batch(const std::vector<MessageSpec>& specs, double timeout_s);
  void wait(Batch& batch, const Waiter& waiter, InterruptCheck interrupt, bool until_changed);
  WaitContext context(const Batch& batch, InterruptCheck interrupt, const std::function<Needs()>& needs,
                      const std::function<std::vector<int>(bool)>& misses) const;
  void fail(const Error& error);
  void loop();

  /// Of every call: whether it may be issued.
  void begin();
  bool send_at_once(const MessageSpec& spec);
  bool recv_at_once(const MessageSpec& spec);

  // All of these are called under mutex_.
  void post(Batch& batch);
  bool waits_for(const Batch& batch, int rank) const;
  std::vector<int> misses(const Batch& batch, bool expires) const;
  Needs needs_of(const Batch& batch) const;
  /// Something was done that `peer` may wait for.
  void ring(int peer) const;
  bool next_candidate(Batch& batch, int from) const;
  void start(const std::shared_ptr<Batch>& batch);
  bool has_arrived(std::int64_t tag);
  void drop_all(const Error& error);
  void progress();
  void send_to(int peer);
  Offer put_offer(const Channel& channel, const MessageSpec& spec, std::uint64_t id);
  void post_offers(int peer, Outgoing& outgoing, const Channel& channel);
  void read_replies(Outgoing& outgoing, const Channel& channel);
  void stream_out(int peer, Outgoing& outgoing, const Channel& channel);
  void receive_from(int peer);
  void take_offers(int peer, Incoming& incoming, const Channel& channel);
  void stream_in(int peer, Incoming& incoming, const Channel& channel);
  void copy_in_place(Incoming& incoming);
  void flush_replies(int peer, Incoming& incoming, const Channel& channel);
  bool match_arrived(Message& receive);
  void accept(int peer, Message& receive, const Offer& offer, const std::byte* eager);
  Message* find_receive(int peer, std::int64_t tag);
  void finish(Message& message, std::unique_ptr<Error> error = nullptr);
  std::unique_ptr<Error> mismatch(const Message& mine, std::uint64_t count, DType dtype) const;

  Group& group_;
  const Membership& members_;
  InterruptCheck interrupt_;
  Waiter waiter_;
  Waiter patient_waiter_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Outgoing> outgoing_;
  std::vector<Incoming> incoming_;
  std::list<Message*> receives_;                     // posted, not matched
  std::list<std::shared_ptr<Batch>> asynchronous_;   // active ones
  std::vector<std::shared_ptr<Batch>> synchronous_;  // active ones, of callers that wait
  std::uint64_t num_posted_ = 0;                     // batches
  std::uint64_t num_started_ = 0;                    // asynchronous ones
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace pycomm::host
