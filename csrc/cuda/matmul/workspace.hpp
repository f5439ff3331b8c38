// Where the buffers of a plan lie in a rank's part of symmetric memory, and in its own.
#pragma once

#include <cstddef>

#include "cuda/device/signal_pad.hpp"
#include "cuda/matmul/overlapped_matmul.hpp"

namespace pycomm::cuda {

/// Offsets in bytes; every buffer starts at a multiple of 256, which is what cuBLASLt's fastest products want.
struct WorkspaceLayout {
  WorkspaceLayout(const MatmulCapacity& capacity, int world_size, bool mapped) {
    const auto rows = [](std::int64_t num, std::int64_t row_bytes) {
      return round_up(static_cast<std::size_t>(num) * static_cast<std::size_t>(row_bytes));
    };
    part_bytes = rows(capacity.shard_rows, capacity.output_row_bytes);
    const std::size_t shard_bytes = rows(capacity.shard_rows, capacity.input_row_bytes);
    const std::size_t arrived_bytes = part_bytes * static_cast<std::size_t>(world_size);
    std::size_t end = round_up(sizeof(std::uint32_t) * kNumFlags * kMaxRanks);
    const auto take = [&end](std::size_t bytes) {
      const std::size_t begin = end;
      end += bytes;
      return begin;
    };
    for (std::size_t& set : shard) set = take(mapped ? shard_bytes : 0);
    for (std::size_t& set : arrived) set = take(arrived_bytes);
    for (std::size_t& set : reduced) set = take(part_bytes);
    shared_bytes = end;
    gathered = 0;
    partial = rows(capacity.rows, capacity.input_row_bytes);
    own_bytes = partial + rows(capacity.rows, capacity.output_row_bytes);
  }

  static constexpr std::size_t round_up(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

  std::size_t shard[2], arrived[2], reduced[2];
  std::size_t part_bytes;  // of one rank's part of kArrived
  std::size_t shared_bytes;
  std::size_t gathered, partial;
  std::size_t own_bytes;
};

}  // namespace pycomm::cuda
