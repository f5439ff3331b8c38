// The tables that reduce.cpp chooses from, one per SIMD level; each is defined by the file compiled for that level.
#pragma once

#include "host/reduce.hpp"

namespace pycomm::host {

struct ReduceTable {
  ReduceFn kernels[kNumNumberTypes][kNumReduceOps];
};

namespace baseline {
extern const ReduceTable kReduceTable;
}

#if defined(__x86_64__) && !defined(PYCOMM_BASELINE_ONLY)
namespace avx2 {
extern const ReduceTable kReduceTable;
}
namespace avx512 {
extern const ReduceTable kReduceTable;
}
#endif

}  // namespace pycomm::host
