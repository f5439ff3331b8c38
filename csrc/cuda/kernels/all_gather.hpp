// Launcher of all_gather.cu; see there for what it does.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/kernels/launch.hpp"

namespace pycomm::cuda {

/// Parts may differ in size, and be empty.
struct AllGatherParams {
  Group group;
  const std::byte* input;        // this rank's part, any memory; may be output[rank]
  std::int64_t bytes;            // of this rank's part
  std::byte* output[kMaxRanks];  // where this rank's part lies in every rank's output
};

void launch_all_gather(const AllGatherParams& params, const LaunchShape& shape);

}  // namespace pycomm::cuda
