// Launchers of all_reduce.cu; see there for what they do.
#pragma once

#include <cstddef>

#include "cuda/device/layout.hpp"
#include "cuda/kernels/launch.hpp"
#include "pycomm/types.hpp"

namespace pycomm::cuda {

inline constexpr int kOneShotBlocks = 32;  // of a one-shot launch, at most; each owns a part of the staging memory

/// Small tensors in any memory.
struct OneShotParams {
  Group group;
  DType dtype;       // of input and output
  DType wire_dtype;  // what travels: dtype, or float16 or bfloat16 for a float32 tensor
  ReduceOp op;
  Layout layout;
  const void* input;
  void* output;                   // may be input
  std::byte* staging[kMaxRanks];  // by rank, symmetric, 16-byte aligned, for calls of this kind alone
  std::size_t staging_bytes;      // of one rank; the same in all calls of a group, since it says where sets lie
  double* squares;                // [layout.num_chunks] sums of squares of the output; null: not wanted
};

/// Bytes of staging that a one-shot call needs with this grid.
std::size_t one_shot_staging_bytes(const Layout& layout, DType wire_dtype, const LaunchShape& shape);

/// Throws std::invalid_argument: the grid, or staging too small. Enqueues on the shape's stream.
void launch_all_reduce_one_shot(const OneShotParams& params, const LaunchShape& shape);

/// Symmetric tensors, in place.
struct TwoShotParams {
  Group group;
  DType dtype;
  ReduceOp op;
  Layout layout;
  void* data[kMaxRanks];       // every rank's tensor
  double* squares[kMaxRanks];  // every rank's [layout.num_chunks]; squares[0] null: not wanted
};

void launch_all_reduce_two_shot(const TwoShotParams& params, const LaunchShape& shape);

}  // namespace pycomm::cuda
