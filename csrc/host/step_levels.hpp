// The kernels that step_kernels.cpp chooses from, one set per SIMD level; each is defined by the file compiled for it.
#pragma once

#include "host/step_kernels.hpp"

namespace pycomm::host {

namespace baseline {
extern const StepKernels kStepKernels;
}

#if defined(__x86_64__) && !defined(PYCOMM_BASELINE_ONLY)
namespace avx2 {
extern const StepKernels kStepKernels;
}
namespace avx512 {
extern const StepKernels kStepKernels;
}
#endif

}  // namespace pycomm::host
