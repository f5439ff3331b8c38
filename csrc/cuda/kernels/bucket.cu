// A bucket's parameters gathered into flat memory and scattered out of it, all of them in one launch; S bytes of
// tensors, B of bucket.
//
//   gather   bucket = cast(scale * tensor), or cast(bucket + scale * tensor): fp32 main gradients over 16-bit ones
//   scatter  tensor = cast(scale * bucket)
//
// One pass: S + B bytes move (2·B + S when adding). Arithmetic is fp32 with one rounding at the end. Each warp finds
// its chunk's parameter by bisection in the table of segments, which stays in cache. Sums of squares and the flag for
// infinities and NaN are of what the bucket then holds, in the same pass. Without cast and with scale 1 a value's bits
// are kept, except that NaN gets its one form.
//
// norm: one block adds the sums of squares in order. 256 at a time are brought to shared memory, where one thread adds
// them: a chain of dependent fp64 additions, one for each 1,024 elements.
#include <cmath>

#include "cuda/device/arithmetic.cuh"
#include "cuda/device/chunks.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/kernels/bucket.hpp"
#include "cuda/kernels/launch.cuh"

namespace pycomm::cuda {
namespace {

constexpr int kNormThreads = 256;

template <class Tensor, class Bucket>
__global__ void __launch_bounds__(kMaxThreads) gather_kernel(const __grid_constant__ BucketParams params) {
  for_each_chunk(0, params.layout.num_chunks, [&](std::int64_t index, std::int64_t) {
    const Chunk chunk = chunk_at(params.layout, index);
    const Tensor* const tensor = static_cast<const Tensor*>(chunk.tensor) + chunk.in_tensor;
    Bucket* const bucket = static_cast<Bucket*>(params.bucket) + chunk.first;
    double squares = 0;
    for_each_group(chunk, [&](int at, int num) {
      const Elements<Tensor> values = load(tensor + at, num);
      Elements<Bucket> result;
      if (params.accumulate) result = load(bucket + at, num);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float value = to_float(values.at[i]) * params.scale;
        result.at[i] = rounded<Bucket>(params.accumulate ? to_float(result.at[i]) + value : value);
      }
      store(bucket + at, result, num);
      if (params.squares != nullptr) add_squares(squares, result, num);
    });
    if (params.squares != nullptr) {
      squares = sum_over_warp(squares);
      if (threadIdx.x % kWarp == 0) {
        params.squares[index] = squares;
        // Squares of fp32 do not overflow fp64, so only an infinity or a NaN makes their sum one. x - x is 0 or NaN.
        if (params.non_finite != nullptr && squares - squares != 0) *params.non_finite = 1;
      }
    }
  });
}

template <class Tensor, class Bucket>
__global__ void __launch_bounds__(kMaxThreads) scatter_kernel(const __grid_constant__ BucketParams params) {
  for_each_chunk(0, params.layout.num_chunks, [&](std::int64_t index, std::int64_t) {
    const Chunk chunk = chunk_at(params.layout, index);
    const Bucket* const bucket = static_cast<const Bucket*>(params.bucket) + chunk.first;
    Tensor* const tensor = static_cast<Tensor*>(chunk.tensor) + chunk.in_tensor;
    for_each_group(chunk, [&](int at, int num) {
      const Elements<Bucket> values = load(bucket + at, num);
      Elements<Tensor> result;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) result.at[i] = rounded<Tensor>(to_float(values.at[i]) * params.scale);
      store(tensor + at, result, num);
    });
  });
}

__global__ void __launch_bounds__(kNormThreads) norm_kernel(const __grid_constant__ NormParams params) {
  auto* const tile = shared_memory<double>();
  double total = 0;
  for (std::int64_t first = 0; first < params.num_squares; first += kNormThreads) {
    const std::int64_t left = params.num_squares - first;
    const int num = static_cast<int>(left < kNormThreads ? left : kNormThreads);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < num) tile[thread] = params.squares[first + thread];
    __syncthreads();
    if (thread == 0) {
      for (int i = 0; i < num; ++i) total += tile[i];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    const auto norm = static_cast<float>(sqrt(total));
    const float scale = params.max_norm / (norm + 1e-6F);
    *params.result = {norm, scale < 1 ? scale : 1.0F, norm - norm != 0 ? 1U : 0U};
  }
}

using BucketKernel = void (*)(BucketParams);

template <class Choose>
void launch_bucket(const char* name, const BucketParams& params, const LaunchShape& shape, Choose choose) {
  check_shape(name, shape, 1 << 16);
  if (params.non_finite != nullptr && params.squares == nullptr) {
    throw std::invalid_argument(std::string(name) +
                                ": the non-finite flag is found through the sums of squares; ask for both");
  }
  if (params.layout.num_chunks == 0) return;
  if (params.layout.segments == nullptr) throw std::invalid_argument(std::string(name) + ": no table of segments");
  dispatch_float(name, params.tensor_dtype, [&](auto tensor) {
    dispatch_float(name, params.bucket_dtype,
                   [&](auto bucket) { launch(name, BucketKernel{choose(tensor, bucket)}, shape, params); });
  });
}

}  // namespace

void launch_bucket_gather(const BucketParams& params, const LaunchShape& shape) {
  launch_bucket("bucket_gather", params, shape, [](auto tensor, auto bucket) {
    return gather_kernel<typename decltype(tensor)::Type, typename decltype(bucket)::Type>;
  });
}

void launch_bucket_scatter(const BucketParams& params, const LaunchShape& shape) {
  launch_bucket("bucket_scatter", params, shape, [](auto tensor, auto bucket) {
    return scatter_kernel<typename decltype(tensor)::Type, typename decltype(bucket)::Type>;
  });
}

void launch_norm(const NormParams& params, Stream stream) {
  launch("norm", norm_kernel, {1, kNormThreads, stream}, params, kNormThreads * sizeof(double));
}

}  // namespace pycomm::cuda
