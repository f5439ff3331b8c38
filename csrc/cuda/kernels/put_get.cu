// Messages from one rank to another: put + signal, so the sender needs no matching call, only a free slot. S bytes.
//
//   put   wait until the slot of this message is free (message k uses slot k mod num_slots: message k - num_slots is
//         taken), copy into the peer's slot, signal "posted"
//   get   wait for "posted", copy out of the slot, signal "taken"
//
// Each side loads and stores S bytes; with a null input, put only signals and get reads the sender's memory: half of
// it.
//
// Both sides cut the bytes into one range a block, and each block signals and waits for its own range: the sender's
// accesses to a slot happen before its "posted" signal, that before the receiver's reads, and those before its "taken"
// signal, which the sender waits for before it writes the slot again. Counts of messages live in the pads and grow with
// each launch, so no host takes part, and a put may be launched before, after or without its get being there.
#include "cuda/device/signal.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/put_get.hpp"

namespace pycomm::cuda {
namespace {

/// This block's range of the message, copied by its threads.
__device__ inline void copy_range(std::byte* to, const std::byte* from, std::int64_t bytes) {
  const Part range = part_of(bytes, kVecBytes, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  std::byte* const targets[1] = {to + range.begin};
  copy_bytes(targets, 1, from + range.begin, range.end - range.begin, static_cast<int>(threadIdx.x),
             static_cast<int>(blockDim.x));
}

__global__ void __launch_bounds__(kMaxThreads) put_kernel(const __grid_constant__ PutParams params) {
  const Channel& channel = params.channel;
  SignalPad& own = own_pad(channel.group);
  const std::uint32_t message = own.num_put[channel.peer][blockIdx.x];
  // Epochs count messages: "taken" has the number of those that the peer has taken.
  const std::uint32_t free_after = message + 1 - static_cast<std::uint32_t>(channel.num_slots);
  if (!wait_in_block(channel.group, &own.taken[channel.peer][blockIdx.x], free_after, channel.peer)) return;
  if (params.input != nullptr) {
    copy_range(params.slots[message % static_cast<std::uint32_t>(channel.num_slots)], params.input, channel.bytes);
  }
  signal_from_block(&channel.group.pads[channel.peer]->posted[channel.group.rank][blockIdx.x], message + 1);
  if (threadIdx.x == 0) own.num_put[channel.peer][blockIdx.x] = message + 1;
}

__global__ void __launch_bounds__(kMaxThreads) get_kernel(const __grid_constant__ GetParams params) {
  const Channel& channel = params.channel;
  SignalPad& own = own_pad(channel.group);
  const std::uint32_t message = own.num_taken[channel.peer][blockIdx.x];
  if (!wait_in_block(channel.group, &own.posted[channel.peer][blockIdx.x], message + 1, channel.peer)) return;
  copy_range(params.output, params.slots[message % static_cast<std::uint32_t>(channel.num_slots)], channel.bytes);
  signal_from_block(&channel.group.pads[channel.peer]->taken[channel.group.rank][blockIdx.x], message + 1);
  if (threadIdx.x == 0) own.num_taken[channel.peer][blockIdx.x] = message + 1;
}

/// With lazy loading a kernel's first launch loads it, and loading may wait for what runs: for a kernel, perhaps, that
/// waits for the one to be loaded. So both are loaded before either is launched.
void load_both() {
  cudaFuncAttributes attributes;
  check_launch("put", cudaFuncGetAttributes(&attributes, put_kernel));
  check_launch("get", cudaFuncGetAttributes(&attributes, get_kernel));
}

void check_channel(const char* kernel, const Channel& channel, const LaunchShape& shape) {
  check_group(kernel, channel.group);
  check_shape(kernel, shape, kMaxBlocks);
  if (channel.peer < 0 || channel.peer >= channel.group.world_size || channel.num_slots < 1 ||
      channel.num_slots > kMaxSlots || kMaxSlots % channel.num_slots != 0) {  // counts wrap at 2^32
    throw std::invalid_argument(std::string(kernel) + ": peer " + std::to_string(channel.peer) + " of " +
                                std::to_string(channel.group.world_size) + " ranks, " +
                                std::to_string(channel.num_slots) + " slots; it takes 1, 2, 4 or 8 slots");
  }
}

}  // namespace

void launch_put(const PutParams& params, const LaunchShape& shape) {
  check_channel("put", params.channel, shape);
  load_both();
  launch("put", put_kernel, shape, params);
}

void launch_get(const GetParams& params, const LaunchShape& shape) {
  check_channel("get", params.channel, shape);
  load_both();
  launch("get", get_kernel, shape, params);
}

}  // namespace pycomm::cuda
