// The arithmetic of an optimizer step on runs of elements: AdamW, squared norms, conversions of 16-bit floats.
//
// Every result has the same bits at every SIMD level, alignment and split into calls (docs/determinism.md): the
// operations are IEEE's, none is contracted, and sums have a fixed order.
#pragma once

#include <cstddef>

#include "pycomm/types.hpp"

namespace pycomm::host {

/// What all elements of a parameter group share in one step. Computed in fp64 by the caller, rounded once.
struct AdamWScalars {
  float grad_scale;        // of clipping, else 1
  float decay;             // 1 - lr * weight_decay
  float one_minus_beta1;   //
  float beta2;             //
  float one_minus_beta2;   //
  float sqrt_correction2;  // sqrt(1 - beta2^t)
  float eps;               //
  float step_size;         // lr / (1 - beta1^t)
};

struct StepKernels {
  /// One step of AdamW (Loshchilov and Hutter, 2019) on `count` elements, in place; in fp32.
  void (*adamw)(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, std::size_t count,
                const AdamWScalars& scalars);
  /// The sum of squares in fp64: element i adds to sum i % 16, and those are added in order.
  double (*squared_norm_float)(const float* values, std::size_t count);
  double (*squared_norm_double)(const double* values, std::size_t count);
  void (*widen_float16)(const void* from, float* to, std::size_t count);
  void (*widen_bfloat16)(const void* from, float* to, std::size_t count);
  /// Rounds to nearest even.
  void (*narrow_float16)(const float* from, void* to, std::size_t count);
  void (*narrow_bfloat16)(const float* from, void* to, std::size_t count);

  void widen(DType dtype, const void* from, float* to, std::size_t count) const {
    (dtype == DType::kFloat16 ? widen_float16 : widen_bfloat16)(from, to, count);
  }
  void narrow(DType dtype, const float* from, void* to, std::size_t count) const {
    (dtype == DType::kFloat16 ? narrow_float16 : narrow_bfloat16)(from, to, count);
  }
};

/// Those of the current SIMD level.
const StepKernels& step_kernels();

}  // namespace pycomm::host
