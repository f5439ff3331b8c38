// The reduction kernels for AVX-512 (F, BW, DQ, VL) and F16C; cmake/sources.cmake has the flags. Empty on other
// architectures.
#if defined(__x86_64__)
#define PYCOMM_SIMD_LEVEL avx512
#include "host/reduce_kernels.hpp"
#endif
