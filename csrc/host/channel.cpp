#include "host/channel.hpp"

#include <algorithm>

namespace pycomm::host {

static_assert(sizeof(Offer) <= kCacheLine);

ChannelSizes ChannelSizes::for_ranks(int world_size) {
  const auto n = static_cast<std::uint64_t>(world_size);
  const auto lines = [](std::uint64_t bytes) { return bytes / kCacheLine * kCacheLine; };
  return {.eager_bytes = lines(std::clamp<std::uint64_t>(64 * 1024 / n, 256, 32 * 1024)),
          .stream_bytes = lines(std::clamp<std::uint64_t>(4096 * 1024 / n, 16 * 1024, 2048 * 1024))};
}

std::size_t ChannelSizes::bytes() const {
  return sizeof(Channel::Header) + Channel::kNumOffers * (kCacheLine + eager_bytes) + stream_bytes;
}

}  // namespace pycomm::host
