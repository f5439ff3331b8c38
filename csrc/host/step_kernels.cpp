#include "host/step_kernels.hpp"

#include "host/reduce.hpp"
#include "host/step_levels.hpp"

namespace pycomm::host {

const StepKernels& step_kernels() {
#if defined(__x86_64__) && !defined(PYCOMM_BASELINE_ONLY)
  const SimdLevel level = simd_level();
  if (level == SimdLevel::kAvx512) return avx512::kStepKernels;
  if (level == SimdLevel::kAvx2) return avx2::kStepKernels;
#endif
  return baseline::kStepKernels;
}

}  // namespace pycomm::host
