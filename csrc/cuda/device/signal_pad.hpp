// What ranks that map each other's memory signal through. Plain structs: the host fills them in, kernels use them
// through signal.cuh.
#pragma once

#include <cstdint>

namespace pycomm::cuda {

inline constexpr int kMaxRanks = 16;
inline constexpr int kMaxBlocks = 128;  // of a kernel that waits for other ranks: all of them must be resident at once

/// One a rank and group, in memory that every rank of the group maps; zero when the group is made. Flags are epochs
/// that only grow, modulo 2^32, and each has one writer. A pad belongs to one group and its kernels to one stream, so
/// a flag is addressed by (group, rank, block) and no two kernels use it at a time.
struct SignalPad {
  std::uint32_t barrier[kMaxBlocks][kMaxRanks];  // [block][by]: barriers that this block of that rank has reached
  std::uint32_t posted[kMaxRanks][kMaxBlocks];   // [by][block]: messages that rank has put here
  std::uint32_t taken[kMaxRanks][kMaxBlocks];    // [by][block]: messages from here that rank has taken
  std::uint32_t abort;                           // not zero: kernels of this group do nothing any more

  // Below: touched by kernels of this rank alone. Counted here and not by the host, so that a captured graph can be
  // replayed.
  std::uint32_t reported;
  std::uint32_t epoch[kMaxBlocks];                 // barriers that this rank's block has reached
  std::uint32_t num_put[kMaxRanks][kMaxBlocks];    // [to][block]
  std::uint32_t num_taken[kMaxRanks][kMaxBlocks];  // [from][block]
};

enum class StatusCode : std::uint32_t {
  kRunning = 0,
  kExpired = 1,  // a rank did not come within the timeout
  kAborted = 2,  // another rank, or the host, has set `abort`
};

/// What the first kernel that gave up tells the host: in memory of the host that the device maps. `code` is written
/// last. While it is kRunning, all kernels that have ended have the right results.
struct Status {
  std::uint32_t code;  // StatusCode
  std::int32_t rank;   // that this one waited for; its own: the group had been aborted before the kernel began
  std::int32_t block;
  std::uint32_t expected;
  std::uint32_t seen;
};

/// A rank's view of its group, handed to kernels by value.
struct Group {
  SignalPad* pads[kMaxRanks];  // by rank; pads[rank] is this rank's own
  Status* status;
  std::uint64_t timeout_ns;  // of each wait
  int rank;
  int world_size;
};

}  // namespace pycomm::cuda
