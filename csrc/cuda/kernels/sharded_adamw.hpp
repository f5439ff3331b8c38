// Launcher of sharded_adamw.cu; see there for what it does.
#pragma once

#include "cuda/device/layout.hpp"
#include "cuda/kernels/bucket.hpp"
#include "cuda/kernels/launch.hpp"
#include "pycomm/types.hpp"

namespace pycomm::cuda {

/// One step's numbers, computed by the host in double and rounded once: see adamw_factors.
struct AdamWFactors {
  float decay;  // 1 - lr * weight_decay
  float beta2;
  float one_minus_beta1;
  float one_minus_beta2;
  float step_size;  // lr / (1 - beta1 ** step)
  float bias2;      // sqrt(1 - beta2 ** step)
  float eps;
};

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
};

/// For step 1, 2, …
AdamWFactors adamw_factors(const AdamWOptions& options, std::int64_t step);

/// Every pointer is to this rank's part of a bucket: the elements whose optimizer state it has. For a plain AdamW the
/// group has one rank, and no pads.
struct ShardedAdamWParams {
  Group group;
  DType grad_dtype;              // float32, float16 or bfloat16
  DType param_dtype;             // the same three
  Layout layout;                 // flat: of this rank's part
  const void* grads[kMaxRanks];  // by rank: their gradients for this part
  int num_grads;                 // world_size; or 1: grads[0] is reduced already
  bool average;                  // divide the sum by num_grads
  float* master;                 // [layout.num_elements] fp32 parameters; null: params[rank], float32, is the only copy
  float* exp_avg;                // [layout.num_elements]
  float* exp_avg_sq;             // [layout.num_elements]
  void* params[kMaxRanks];       // by rank: where this part lies in their parameters
  AdamWFactors factors;
  const ClipResult* clip;  // device memory: scales the gradient, or skips the step; null: neither
};

void launch_sharded_adamw(const ShardedAdamWParams& params, const LaunchShape& shape);

}  // namespace pycomm::cuda
