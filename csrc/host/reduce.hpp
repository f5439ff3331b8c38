// Element-wise reductions over several buffers, the arithmetic of every host collective.
//
// Order and rounding are law 2 (docs/determinism.md): start from src[0], combine src[1], src[2], … in order; 16-bit
// floats accumulate in fp32 and round once, to nearest even; avg divides once, in the accumulator, by num_src;
// integers wrap. NaN propagates through every operator; -0.0 survives. The bits of a finite result are the same at
// every SIMD level, alignment and split into calls.
#pragma once

#include <cstddef>
#include <string_view>

#include "pycomm/call.hpp"

namespace pycomm::host {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };  // kBaseline: what the architecture guarantees (SSE2, NEON)

/// dst[k][i] = op over j of src[j][i], for all i < count and k < num_dst. A destination may be the same buffer as a
/// source (same start); other overlap is not allowed. num_src >= 1, num_dst >= 1. No alignment is required.
using ReduceFn = void (*)(const void* const* src, int num_src, void* const* dst, int num_dst, std::size_t count);

/// A ReduceFn over elements of any dtype that has the operator.
class ReduceKernel {
 public:
  ReduceKernel(ReduceFn function, std::size_t numbers) : function_(function), numbers_(numbers) {}
  void operator()(const void* const* src, int num_src, void* const* dst, int num_dst, std::size_t count) const {
    function_(src, num_src, dst, num_dst, count * numbers_);
  }

 private:
  ReduceFn function_;
  std::size_t numbers_;  // of an element
};

/// The kernel for this element type and operator at the current SIMD level. Throws what arithmetic_of does.
ReduceKernel reduce_kernel(DType dtype, ReduceOp op);

SimdLevel simd_level();
SimdLevel best_simd_level();
/// Force a level, for tests and comparisons. Throws std::invalid_argument if the processor lacks it.
void set_simd_level(SimdLevel level);
SimdLevel parse_simd_level(std::string_view name);  // "baseline", "avx2", "avx512"
const char* name_of(SimdLevel level);

}  // namespace pycomm::host
