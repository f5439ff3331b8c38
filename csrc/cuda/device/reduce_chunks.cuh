// The inner part of every kernel that reduces over ranks: chunks dealt to warps, each element reduced in rank order,
// stored where the kernel wants it, with the sums of squares that were asked for.
#pragma once

#include <cstdint>

#include "cuda/device/arithmetic.cuh"
#include "cuda/device/chunks.cuh"
#include "cuda/device/signal.cuh"

namespace pycomm::cuda {

/// `values` to target(rank) + at for every rank of the group.
template <class T, class Target>
__device__ inline void store_to_all(const Group& group, const Target& target, int at, const Elements<T>& values,
                                    int num) {
  for (int k = 0; k < group.world_size; ++k) store(target(nth_peer(group, k)) + at, values, num);
}

/// For chunks [part.begin, part.end): elements of source(rank, chunk, place) over ranks 0 … n-1 go, as Out, to
/// store_values(chunk, offset in it, values, their number). With squares: every lane of the warp then calls
/// store_squares(lane, index of the chunk, the sum of their squares). `place`: see for_each_chunk.
template <class In, class Out, class Source, class StoreValues, class StoreSquares>
__device__ inline void reduce_chunks(const Layout& layout, Part part, int num_ranks, ReduceOp op, bool with_squares,
                                     Source source, StoreValues store_values, StoreSquares store_squares) {
  for_each_chunk(part.begin, part.end, [&](std::int64_t index, std::int64_t place) {
    const Chunk chunk = chunk_at(layout, index);
    const auto from = [&](int rank) { return source(rank, chunk, place); };
    double squares = 0;
    for_each_group(chunk, [&](int at, int num) {
      const Elements<Out> values = reduced<In, Out>(from, num_ranks, at, num, op);
      store_values(chunk, at, values, num);
      if (with_squares) add_squares(squares, values, num);
    });
    if (with_squares) store_squares(static_cast<int>(threadIdx.x) % kWarp, index, sum_over_warp(squares));
  });
}

}  // namespace pycomm::cuda
