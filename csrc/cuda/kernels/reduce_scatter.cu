// Reduce-scatter over symmetric memory. n ranks, S bytes of input each.
//
//   barrier  every rank's input is there
//   reduce   rank r: its part of ranks 0 … n-1  ->  its output
//   barrier  all have read
//
// A rank loads S bytes, (n-1)/n of them from peers, and stores S/n. Nobody leaves while a peer may read its input: a
// block leaves after the same block of all others has arrived at the last barrier, and a kernel ends after all its
// blocks. Part r of every input is read by rank r alone, so its output may be its own part, in place.
//
// 16-bit inputs may be left in fp32, unrounded: that is bfloat16 on the wire with fp32 sums. The sums of squares of
// the output are written to every rank, so that all add up the same numbers in the same order.
//
// In a group of one, with several inputs, it is a reduction without barriers of what has been brought here: the last
// step of matmul_reduce_scatter (csrc/cuda/matmul).
#include "cuda/device/reduce_chunks.cuh"
#include "cuda/device/signal.cuh"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/reduce_scatter.hpp"

namespace pycomm::cuda {
namespace {

template <class In, class Out>
__global__ void __launch_bounds__(kMaxThreads, 1)
    reduce_scatter_kernel(const __grid_constant__ ReduceScatterParams params) {
  const int n = params.group.world_size;
  const int num_inputs = params.num_inputs == 0 ? n : params.num_inputs;
  RankBarrier barrier(params.group);
  if (!barrier.wait()) return;
  const auto input = [&](int rank, const Chunk& chunk, std::int64_t) {
    return static_cast<const In*>(params.input[rank]) + chunk.first;
  };
  const auto to_output = [&](const Chunk& chunk, int at, const Elements<Out>& values, int num) {
    store(static_cast<Out*>(params.output) + chunk.first + at, values, num);
  };
  const auto squares_to_all = [&](int lane, std::int64_t index, double squares) {
    if (lane < n) params.squares[lane][index] = squares;
  };
  reduce_chunks<In, Out>(params.layout, {0, params.layout.num_chunks}, num_inputs, params.op,
                         params.squares[0] != nullptr, input, to_output, squares_to_all);
  if (!barrier.wait()) return;
  barrier.finish();
}

}  // namespace

void launch_reduce_scatter(const ReduceScatterParams& params, const LaunchShape& shape) {
  constexpr const char* kName = "reduce_scatter";
  check_group(kName, params.group);
  check_shape(kName, shape, max_blocks_of(params.group));
  check_op(kName, params.dtype, params.op);
  if (params.num_inputs < 0 || params.num_inputs > kMaxRanks ||
      (params.num_inputs != 0 && params.group.world_size != 1)) {
    throw std::invalid_argument(std::string(kName) + ": " + std::to_string(params.num_inputs) + " inputs for " +
                                std::to_string(params.group.world_size) + " ranks; a group of one takes up to " +
                                std::to_string(kMaxRanks) + ", others one a rank");
  }
  if (params.dtype == params.output_dtype) {
    return dispatch(kName, params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::Type;
      launch(kName, reduce_scatter_kernel<T, T>, shape, params);
    });
  }
  if (params.output_dtype != DType::kFloat32) {
    throw std::invalid_argument(std::string(kName) + ": dtype " + name_of(params.dtype) + " into output dtype " +
                                name_of(params.output_dtype) + "; it is the same or float32");
  }
  dispatch_float(kName, params.dtype, [&](auto tag) {
    launch(kName, reduce_scatter_kernel<typename decltype(tag)::Type, float>, shape, params);
  });
}

}  // namespace pycomm::cuda
