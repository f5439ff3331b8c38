// Launchers of bucket.cu; see there for what they do.
#pragma once

#include "cuda/device/layout.hpp"
#include "cuda/kernels/launch.hpp"
#include "pycomm/types.hpp"

namespace pycomm::cuda {

/// float32, float16 and bfloat16, in any combination. Segment::data is each parameter's tensor.
struct BucketParams {
  DType tensor_dtype;
  DType bucket_dtype;
  Layout layout;
  void* bucket;
  float scale;
  bool accumulate;            // gather: add to what is in the bucket
  double* squares;            // gather: [layout.num_chunks] sums of squares of what the bucket then holds; or null
  std::uint32_t* non_finite;  // gather: set to 1 if the bucket then holds an infinity or a NaN; or null. Needs squares
};

/// bucket = scale * tensors, or bucket += scale * tensors.
void launch_bucket_gather(const BucketParams& params, const LaunchShape& shape);

/// tensors = scale * bucket.
void launch_bucket_scatter(const BucketParams& params, const LaunchShape& shape);

/// What to do with a gradient whose squares have been summed: in device memory, for later kernels.
struct ClipResult {
  float norm;
  float scale;         // min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_
  std::uint32_t skip;  // the norm is not finite
};

/// Adds num_squares sums one after the other, in fp64: the order of docs/determinism.md.
struct NormParams {
  const double* squares;
  std::int64_t num_squares;
  float max_norm;  // infinity: no clipping
  ClipResult* result;
};

void launch_norm(const NormParams& params, Stream stream);

}  // namespace pycomm::cuda
