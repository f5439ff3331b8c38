// The reduction kernels for what the architecture guarantees: SSE2 on x86-64, NEON on aarch64.
#define PYCOMM_SIMD_LEVEL baseline
#include "host/reduce_kernels.hpp"
