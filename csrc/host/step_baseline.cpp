// The kernels of an optimizer step for what the architecture guarantees: SSE2 or NEON.
#define PYCOMM_SIMD_LEVEL baseline
#include "host/step_loops.hpp"
