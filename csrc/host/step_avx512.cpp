// The kernels of an optimizer step for AVX512; cmake/sources.cmake has the flags. Empty on other architectures.
#if defined(__x86_64__)
#define PYCOMM_SIMD_LEVEL avx512
#include "host/step_loops.hpp"
#endif
