// Where a bucket's parameters lie, as kernels are told. Plain structs for the host.
#pragma once

#include <cstdint>

namespace pycomm::cuda {

/// Elements whose squares are added up before their sum is stored (docs/determinism.md).
inline constexpr int kChunkElements = 1024;

/// One parameter's place in a bucket. `data`: its own tensor, for kernels that gather or scatter.
struct Segment {
  std::int64_t first;
  std::int64_t num_elements;
  std::int64_t first_chunk;
  void* data;
};

/// A bucket, or the part of one that a kernel works on.
struct Layout {
  const Segment* segments;  // in device memory, by first_chunk; null: one parameter, from element 0
  int num_segments;
  int chunk_elements;  // kChunkElements; less, a multiple of 8, spreads small tensors over more warps
  std::int64_t num_chunks;
  std::int64_t num_elements;
};

/// A tensor that is no bucket.
constexpr Layout flat_layout(std::int64_t num_elements, int chunk_elements = kChunkElements) {
  return {nullptr, 0, chunk_elements, (num_elements + chunk_elements - 1) / chunk_elements, num_elements};
}

}  // namespace pycomm::cuda
