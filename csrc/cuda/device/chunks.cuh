// How elements are dealt to warps. A tensor, or a bucket of parameters that lie in it one after the other, is cut into
// chunks of 1,024 elements that start anew at each parameter; a warp takes a whole chunk, and lane l of it the groups
// of eight elements l, l + 32, l + 64, l + 96. So who adds which squares, and in which order, depends on no width, no
// alignment, no grid and no sharding that cuts between chunks: the squared norm is the same bits everywhere.
#pragma once

#include <cstdint>

#include "cuda/device/layout.hpp"
#include "cuda/device/vec.cuh"

namespace pycomm::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffU;

struct Chunk {
  std::int64_t first;      // its first element in the bucket
  std::int64_t in_tensor;  // the same element in the parameter's own tensor
  int num;                 // elements, at most layout.chunk_elements
  void* tensor;            // Segment::data
};

__device__ inline Chunk chunk_at(const Layout& layout, std::int64_t index) {
  Segment segment{0, layout.num_elements, 0, nullptr};
  if (layout.segments != nullptr) {
    int low = 0;  // the last segment that starts at or before `index`: empty ones have no chunk
    for (int high = layout.num_segments; high - low > 1;) {
      const int middle = (low + high) / 2;
      (layout.segments[middle].first_chunk <= index ? low : high) = middle;
    }
    segment = layout.segments[low];
  }
  const std::int64_t in_tensor = (index - segment.first_chunk) * layout.chunk_elements;
  const std::int64_t left = segment.num_elements - in_tensor;
  const int num = static_cast<int>(left < layout.chunk_elements ? left : layout.chunk_elements);
  return {segment.first + in_tensor, in_tensor, num, segment.data};
}

/// Calls body(index of a chunk, its place among this block's) in whole warps, for chunks [begin, end).
template <class Body>
__device__ inline void for_each_chunk(std::int64_t begin, std::int64_t end, Body body) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  std::int64_t place = warp;
  for (std::int64_t index = begin + static_cast<std::int64_t>(blockIdx.x) * warps + warp; index < end;
       index += static_cast<std::int64_t>(gridDim.x) * warps, place += warps) {
    body(index, place);
  }
}

/// Calls body(offset in the chunk, elements) for this lane's groups.
template <class Body>
__device__ inline void for_each_group(const Chunk& chunk, Body body) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int at = lane * kGroup; at < chunk.num; at += kWarp * kGroup) {
    body(at, chunk.num - at < kGroup ? chunk.num - at : kGroup);
  }
}

/// The sum of all lanes' values, on every lane: neighbours 16 apart are added first, then 8, 4, 2, 1. Addition
/// commutes, so all lanes get the same bits.
__device__ inline double sum_over_warp(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

}  // namespace pycomm::cuda
