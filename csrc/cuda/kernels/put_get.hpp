// Launchers of put_get.cu; see there for what they do.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/kernels/launch.hpp"

namespace pycomm::cuda {

inline constexpr int kMaxSlots = 8;

/// A one-way channel between two ranks of a group. Both ends give the same bytes, slots and number of blocks to the
/// put and to the get of a message.
struct Channel {
  Group group;
  int peer;
  int num_slots;  // 1, 2, 4 or 8 messages may be under way
  std::int64_t bytes;
};

struct PutParams {
  Channel channel;
  // Null: nothing is copied, the peer reads where it lies (get with its `slots`). It may be written again when the
  // message is taken, which the next put of a channel with one slot waits for.
  const std::byte* input;
  std::byte* slots[kMaxSlots];  // in the peer's memory
};

struct GetParams {
  Channel channel;
  const std::byte* slots[kMaxSlots];  // the same slots as this rank maps them, or the peer's own memory
  std::byte* output;
};

void launch_put(const PutParams& params, const LaunchShape& shape);
void launch_get(const GetParams& params, const LaunchShape& shape);

}  // namespace pycomm::cuda
