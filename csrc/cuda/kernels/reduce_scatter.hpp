// Launcher of reduce_scatter.cu; see there for what it does.
#pragma once

#include "cuda/device/layout.hpp"
#include "cuda/kernels/launch.hpp"
#include "pycomm/types.hpp"

namespace pycomm::cuda {

/// Every pointer is to this rank's part. Parts may differ in size, and be empty.
struct ReduceScatterParams {
  Group group;
  DType dtype;         // of the inputs, and what travels
  DType output_dtype;  // the same, or float32
  ReduceOp op;
  Layout layout;                 // of this rank's part
  const void* input[kMaxRanks];  // this rank's part of every rank's tensor
  void* output;                  // [layout.num_elements], any memory; may be input[rank] where the types are the same
  double* squares[kMaxRanks];    // where this part's chunks lie in every rank's sums of squares; [0] null: not wanted
  int num_inputs = 0;            // 0: one a rank. In a group of one: any number, all of them this rank's to read
};

void launch_reduce_scatter(const ReduceScatterParams& params, const LaunchShape& shape);

}  // namespace pycomm::cuda
