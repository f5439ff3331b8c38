#include "host/reduce.hpp"

#include <atomic>
#include <stdexcept>
#include <string>

#include "host/reduce_levels.hpp"

namespace pycomm::host {
namespace {

constexpr SimdLevel kLevels[] = {SimdLevel::kBaseline, SimdLevel::kAvx2, SimdLevel::kAvx512};

bool is_supported(SimdLevel level) {
#if defined(__x86_64__) && !defined(PYCOMM_BASELINE_ONLY)
  // These ask the operating system too, which must save the wide registers.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  switch (level) {
    case SimdLevel::kBaseline:
      return true;
    case SimdLevel::kAvx2:
      return has_avx2;
    case SimdLevel::kAvx512:
      return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return level == SimdLevel::kBaseline;
}

const ReduceTable& table_of(SimdLevel level) {
#if defined(__x86_64__) && !defined(PYCOMM_BASELINE_ONLY)
  if (level == SimdLevel::kAvx512) return avx512::kReduceTable;
  if (level == SimdLevel::kAvx2) return avx2::kReduceTable;
#endif
  static_cast<void>(level);
  return baseline::kReduceTable;
}

// One for the process: it changes speed, never a result. Relaxed order suffices, since nothing else hangs on it.
std::atomic<SimdLevel>& current_level() {
  static std::atomic<SimdLevel> level{best_simd_level()};
  return level;
}

std::string supported_names() {
  std::string names;
  for (const SimdLevel level : kLevels) {
    if (is_supported(level)) names += (names.empty() ? "" : ", ") + std::string(name_of(level));
  }
  return names;
}

}  // namespace

ReduceKernel reduce_kernel(DType dtype, ReduceOp op) {
  const Arithmetic numbers = arithmetic_of(dtype, op);
  return {table_of(simd_level()).kernels[static_cast<int>(numbers.dtype)][static_cast<int>(numbers.op)],
          numbers.per_element};
}

SimdLevel simd_level() { return current_level().load(std::memory_order_relaxed); }

SimdLevel best_simd_level() {
  if (is_supported(SimdLevel::kAvx512)) return SimdLevel::kAvx512;
  return is_supported(SimdLevel::kAvx2) ? SimdLevel::kAvx2 : SimdLevel::kBaseline;
}

void set_simd_level(SimdLevel level) {
  if (!is_supported(level)) {
    throw std::invalid_argument("SIMD level \"" + std::string(name_of(level)) +
                                "\" is not supported by this processor; it supports " + supported_names());
  }
  current_level().store(level, std::memory_order_relaxed);
}

SimdLevel parse_simd_level(std::string_view name) {
  for (const SimdLevel level : kLevels) {
    if (name == name_of(level)) return level;
  }
  throw std::invalid_argument("unknown SIMD level \"" + std::string(name) + "\": it is one of baseline, avx2, avx512");
}

const char* name_of(SimdLevel level) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(level)];
}

}  // namespace pycomm::host
