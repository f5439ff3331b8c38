// The one-way link between two ranks, in shared memory: offers and a byte stream to the receiver, replies back.
//
//   sender -> receiver  offers[]  a ring of announcements, small messages' bytes included
//                       stream    a ring of bytes, for large messages from ordinary memory, once the receiver asks for
//                       them
//   receiver -> sender  replies[] a ring: send me the bytes of offer i; offer i is done; offer i does not fit
//
// Each ring has one writer and one reader, each of whom owns one ever-growing count. Contents are written before the
// writer's count and read after it; space is used again after the reader's count has passed it (signal.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "pycomm/call.hpp"
#include "pycomm/signal.hpp"

namespace pycomm::host {

enum class Transfer : std::uint8_t {
  kEager,     // the bytes lie behind the offer; the sender is done
  kInPlace,   // the receiver copies them out of the sender's symmetric memory
  kStreamed,  // the sender streams them once it is asked to
};

struct Offer {
  std::uint64_t id = 0;  // counts the sender's messages to this receiver
  std::int64_t tag = 0;
  std::uint64_t count = 0;
  DType dtype = DType::kUInt8;
  Transfer transfer = Transfer::kEager;
  std::uint8_t reserved[6] = {};
  Location location;  // kInPlace

  std::uint64_t bytes() const { return count * size_of(dtype); }
};

struct Reply {
  enum class Kind : std::uint8_t { kSend, kDone, kMismatch };
  std::uint64_t id = 0;
  std::uint64_t count = 0;  // kMismatch: what the receiver expected
  DType dtype = DType::kUInt8;
  Kind kind = Kind::kDone;
  std::uint8_t reserved[6] = {};
};

struct ChannelSizes {
  std::uint64_t eager_bytes = 0;   // up to this size a message rides with its offer
  std::uint64_t stream_bytes = 0;  // of the byte stream

  /// n * n channels must stay small for many ranks.
  static ChannelSizes for_ranks(int world_size);
  std::size_t bytes() const;
};

class Channel {
 public:
  static constexpr std::uint64_t kNumOffers = 16;
  static constexpr std::uint64_t kNumReplies = 64;

  Channel(std::byte* memory, const ChannelSizes& sizes) : memory_(memory), sizes_(sizes) {}

  struct Header {
    alignas(kCacheLine) std::uint64_t offered;  // sender's: offers written
    std::uint64_t streamed;                     //           bytes written to the stream
    std::uint64_t replies_read;                 //           replies read
    alignas(kCacheLine) std::uint64_t taken;    // receiver's: offers read
    std::uint64_t stream_read;                  //             bytes read from the stream
    std::uint64_t replied;                      //             replies written
    alignas(kCacheLine) Reply replies[kNumReplies];
  };

  Header& header() const { return *reinterpret_cast<Header*>(memory_); }
  Offer& offer(std::uint64_t number) const {
    return *reinterpret_cast<Offer*>(memory_ + sizeof(Header) + (number % kNumOffers) * offer_stride());
  }
  std::byte* eager_data(std::uint64_t number) const {
    return reinterpret_cast<std::byte*>(&offer(number)) + kCacheLine;
  }
  Reply& reply(std::uint64_t number) const { return header().replies[number % kNumReplies]; }
  std::byte* stream(std::uint64_t position) const {
    return memory_ + sizeof(Header) + kNumOffers * offer_stride() + position % sizes_.stream_bytes;
  }
  const ChannelSizes& sizes() const { return sizes_; }

 private:
  std::size_t offer_stride() const { return kCacheLine + sizes_.eager_bytes; }

  std::byte* memory_;
  ChannelSizes sizes_;
};

}  // namespace pycomm::host
