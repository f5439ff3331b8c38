// All-gather over symmetric memory. n ranks, S bytes of output each.
//
//   barrier  every rank's output may be written
//   copy     rank r: its part  ->  part r of ranks 0 … n-1
//   barrier  all parts are there
//
// A rank loads S/n bytes and stores S, (n-1)/n of them to peers. Only rank r writes part r of any output, so the input
// may be its own part. The two barriers are those of two-shot all-reduce (all_reduce.cu), with the same argument.
#include <algorithm>

#include "cuda/device/signal.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/kernels/all_gather.hpp"
#include "cuda/kernels/launch.cuh"

namespace pycomm::cuda {
namespace {

__global__ void __launch_bounds__(kMaxThreads) all_gather_kernel(const __grid_constant__ AllGatherParams params) {
  RankBarrier barrier(params.group);
  if (!barrier.wait()) return;
  copy_bytes(params.output, params.group.world_size, params.input, params.bytes,
             static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), static_cast<int>(gridDim.x * blockDim.x));
  if (!barrier.wait()) return;
  barrier.finish();
}

}  // namespace

void launch_all_gather(const AllGatherParams& params, const LaunchShape& shape) {
  check_group("all_gather", params.group);
  check_shape("all_gather", shape, max_blocks_of(params.group));
  // Each rank starts with itself, so that not all write to one peer at a time.
  AllGatherParams rotated = params;
  std::rotate_copy(params.output, params.output + params.group.rank, params.output + params.group.world_size,
                   rotated.output);
  launch("all_gather", all_gather_kernel, shape, rotated);
}

}  // namespace pycomm::cuda
