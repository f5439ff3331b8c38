// All-reduce over symmetric memory. n ranks, S bytes.
//
// One-shot, for messages whose cost is latency:
//
//   stage    copy (and cast to the wire's type) the input into this rank's staging memory
//   barrier  every rank's staging is there
//   reduce   every rank reads all stagings and reduces everything itself, into its output
//
// One step; a rank loads S + n·S bytes and stores 2·S. There is no barrier at the end, since two sets of staging take
// turns. Each block has a part of its own of both, so only the same block of other ranks reads what it writes. It
// writes a set again two one-shot calls later, after the barrier of the call in between, which its readers enter only
// when they have read the set. The set is the parity of the block's epoch: one-shot adds one to it, other kernels two.
//
// Two-shot, for the others ("push", as on the host, csrc/host/all_reduce.cpp):
//
//   barrier  every rank's tensor is there
//   reduce   rank r: its part of ranks 0 … n-1  ->  its part of ranks 0 … n-1
//   barrier  all parts are reduced, and every rank's are written
//
// Two steps; a rank loads S and stores S bytes, (n-1)/n of them to and from peers. Only rank r touches part r between
// the barriers, so it can be done in place. A block leaves after the same block of all others has arrived at the last
// barrier, and a kernel ends after all its blocks, so the next kernel finds every part written and nobody reading.
//
// Parts are cut between chunks; the sums of squares of part r are written to every rank beside the part.
//
// Source: Rabenseifner's reduce-scatter + all-gather decomposition; vLLM's custom_all_reduce.cuh for the two stages.
#include "cuda/device/reduce_chunks.cuh"
#include "cuda/device/signal.cuh"
#include "cuda/kernels/all_reduce.hpp"
#include "cuda/kernels/launch.cuh"

namespace pycomm::cuda {
namespace {

constexpr std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

/// Bytes of one block's part of one set.
std::int64_t set_bytes_of_block(const Layout& layout, std::size_t element_bytes, const LaunchShape& shape) {
  const std::int64_t warps = shape.num_threads / kWarp;
  const std::int64_t rounds = (layout.num_chunks + shape.num_blocks * warps - 1) / (shape.num_blocks * warps);
  return rounds * warps * layout.chunk_elements * static_cast<std::int64_t>(element_bytes);
}

template <class T, class Wire>
__global__ void __launch_bounds__(kMaxThreads, 1) one_shot_kernel(const __grid_constant__ OneShotParams params) {
  RankBarrier barrier(params.group);
  const std::size_t set_bytes = params.staging_bytes / (2 * kOneShotBlocks);
  const std::size_t set = (barrier.epoch() % 2 * kOneShotBlocks + blockIdx.x) * set_bytes;
  const auto staged = [&](int rank) { return reinterpret_cast<Wire*>(params.staging[rank] + set); };

  // A rank that gave up in an earlier call must not change what others may still be reading.
  const auto* input = static_cast<const T*>(params.input);
  for_each_chunk(0, barrier.was_aborted() ? 0 : params.layout.num_chunks, [&](std::int64_t index, std::int64_t place) {
    const Chunk chunk = chunk_at(params.layout, index);
    Wire* const to = staged(params.group.rank) + place * params.layout.chunk_elements;
    for_each_group(chunk, [&](int at, int num) {
      const auto own = [&](int) { return input + chunk.first; };
      store(to + at, reduced<T, Wire>(own, 1, at, num, params.op), num);
    });
  });
  if (!barrier.wait()) return;
  const auto source = [&](int rank, const Chunk&, std::int64_t place) {
    return staged(rank) + place * params.layout.chunk_elements;
  };
  const auto to_output = [&](const Chunk& chunk, int at, const Elements<T>& values, int num) {
    store(static_cast<T*>(params.output) + chunk.first + at, values, num);
  };
  const auto to_own = [&](int lane, std::int64_t index, double squares) {
    if (lane == 0) params.squares[index] = squares;
  };
  reduce_chunks<Wire, T>(params.layout, {0, params.layout.num_chunks}, params.group.world_size, params.op,
                         params.squares != nullptr, source, to_output, to_own);
  barrier.finish();
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) two_shot_kernel(const __grid_constant__ TwoShotParams params) {
  const int n = params.group.world_size;
  RankBarrier barrier(params.group);
  if (!barrier.wait()) return;
  const auto data = [&](int rank, const Chunk& chunk, std::int64_t) {
    return static_cast<T*>(params.data[rank]) + chunk.first;
  };
  const auto to_all = [&](const Chunk& chunk, int at, const Elements<T>& values, int num) {
    store_to_all(params.group, [&](int rank) { return data(rank, chunk, 0); }, at, values, num);
  };
  const auto squares_to_all = [&](int lane, std::int64_t index, double squares) {
    if (lane < n) params.squares[lane][index] = squares;
  };
  reduce_chunks<T, T>(params.layout, part_of(params.layout.num_chunks, 1, params.group.rank, n), n, params.op,
                      params.squares[0] != nullptr, data, to_all, squares_to_all);
  if (!barrier.wait()) return;
  barrier.finish();
}

template <class T, class Wire>
void launch_one_shot(const OneShotParams& params, const LaunchShape& shape) {
  launch("all_reduce_one_shot", one_shot_kernel<T, Wire>, shape, params);
}

}  // namespace

std::size_t one_shot_staging_bytes(const Layout& layout, DType wire_dtype, const LaunchShape& shape) {
  const std::int64_t part = round_up(set_bytes_of_block(layout, size_of(wire_dtype), shape), kVecBytes);
  return static_cast<std::size_t>(part) * 2 * kOneShotBlocks;
}

void launch_all_reduce_one_shot(const OneShotParams& params, const LaunchShape& shape) {
  constexpr const char* kName = "all_reduce_one_shot";
  check_group(kName, params.group);
  check_shape(kName, shape, kOneShotBlocks);
  check_op(kName, params.dtype, params.op);
  const std::size_t needed = one_shot_staging_bytes(params.layout, params.wire_dtype, shape);
  if (params.staging_bytes < needed || params.staging_bytes % (2 * kOneShotBlocks * kVecBytes) != 0) {
    throw std::invalid_argument(std::string(kName) + ": " + std::to_string(params.staging_bytes) +
                                " bytes of staging; this call needs a multiple of " +
                                std::to_string(2 * kOneShotBlocks * kVecBytes) + ", at least " +
                                std::to_string(needed));
  }
  if (params.dtype == params.wire_dtype) {
    return dispatch(kName, params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::Type;
      launch_one_shot<T, T>(params, shape);
    });
  }
  if (params.dtype != DType::kFloat32) {
    throw std::invalid_argument(std::string(kName) + ": dtype " + name_of(params.dtype) + " over wire dtype " +
                                name_of(params.wire_dtype) + "; only float32 travels as another type");
  }
  dispatch_float(kName, params.wire_dtype,
                 [&](auto tag) { launch_one_shot<float, typename decltype(tag)::Type>(params, shape); });
}

void launch_all_reduce_two_shot(const TwoShotParams& params, const LaunchShape& shape) {
  constexpr const char* kName = "all_reduce_two_shot";
  check_group(kName, params.group);
  check_shape(kName, shape, max_blocks_of(params.group));
  check_op(kName, params.dtype, params.op);
  dispatch(kName, params.dtype,
           [&](auto tag) { launch(kName, two_shot_kernel<typename decltype(tag)::Type>, shape, params); });
}

}  // namespace pycomm::cuda
