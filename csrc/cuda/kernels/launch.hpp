// What every launcher needs: the stream's handle, the grid, and checks of both.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device/signal_pad.hpp"
#include "pycomm/error.hpp"

struct CUstream_st;

namespace pycomm::cuda {

using Stream = CUstream_st*;  // cudaStream_t, without the header that defines it

struct LaunchShape {
  int num_blocks;
  int num_threads;  // a block; a multiple of 32
  Stream stream;
  int num_waiting = 1;  // kernels of this shape that wait for each other on this GPU: those of ranks that share it
};

inline constexpr int kMaxThreads = 512;

/// Throws std::invalid_argument for a grid that the kernel is not written for.
inline void check_shape(const char* kernel, const LaunchShape& shape, int max_blocks) {
  if (shape.num_blocks < 1 || shape.num_blocks > max_blocks || shape.num_threads < 32 ||
      shape.num_threads > kMaxThreads || shape.num_threads % 32 != 0) {
    throw std::invalid_argument(std::string(kernel) + ": " + std::to_string(shape.num_blocks) + " blocks of " +
                                std::to_string(shape.num_threads) + " threads; it takes 1 to " +
                                std::to_string(max_blocks) + " blocks of 32 to " + std::to_string(kMaxThreads) +
                                " threads, whole warps");
  }
}

/// Blocks that wait for other ranks must all be resident; those of a group of one wait for nobody.
inline int max_blocks_of(const Group& group) { return group.world_size == 1 ? 1 << 16 : kMaxBlocks; }

inline void check_group(const char* kernel, const Group& group) {
  if (group.world_size < 1 || group.world_size > kMaxRanks || group.rank < 0 || group.rank >= group.world_size) {
    throw std::invalid_argument(std::string(kernel) + ": rank " + std::to_string(group.rank) + " of " +
                                std::to_string(group.world_size) + "; it serves 1 to " + std::to_string(kMaxRanks) +
                                " ranks");
  }
  if (group.world_size == 1) return;  // waits for nobody
  for (int rank = 0; rank < group.world_size; ++rank) {
    if (group.pads[rank] == nullptr) {
      throw std::invalid_argument(std::string(kernel) + ": no signal pad of rank " + std::to_string(rank));
    }
  }
  if (group.status == nullptr) throw std::invalid_argument(std::string(kernel) + ": no status word");
}

}  // namespace pycomm::cuda
