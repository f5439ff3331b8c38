// The loops of step_kernels.hpp, compiled once per SIMD level: each step_<level>.cpp defines PYCOMM_SIMD_LEVEL and
// includes this file. As in reduce_kernels.hpp, everything lies in that level's namespace.
#pragma once

#ifndef PYCOMM_SIMD_LEVEL
#error "define PYCOMM_SIMD_LEVEL, the namespace of this SIMD level, before including this file"
#endif

#include <utility>

#include "host/reduce_lanes.hpp"
#include "host/step_levels.hpp"

namespace pycomm::host::PYCOMM_SIMD_LEVEL {

inline constexpr std::size_t kNormSums = 16;

// The states move towards the gradient as torch's lerp and addcmul do. The square root needs -fno-math-errno to be
// one instruction.
void adamw(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
           float* __restrict exp_avg_sq, std::size_t count, const AdamWScalars& scalars) {
  const AdamWScalars s = scalars;
  for (std::size_t i = 0; i < count; ++i) {
    const float g = grad[i] * s.grad_scale;
    const float m = exp_avg[i] + (g - exp_avg[i]) * s.one_minus_beta1;
    const float v = exp_avg_sq[i] * s.beta2 + g * g * s.one_minus_beta2;
    const float scale = __builtin_sqrtf(v) / s.sqrt_correction2 + s.eps;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = param[i] * s.decay - m / scale * s.step_size;
  }
}

template <class T>
double squared_norm(const T* values, std::size_t count) {
  // As many values as fill a vector once they are fp64.
  constexpr std::size_t kWidth = kVecBytes / sizeof(double);
  constexpr std::size_t kVecs = kNormSums / kWidth;
  typedef double DoubleVec __attribute__((vector_size(kVecBytes)));
  typedef T ValueVec __attribute__((vector_size(kWidth * sizeof(T))));
  DoubleVec sums[kVecs] = {};
  const std::size_t full = count - count % kNormSums;
  for (std::size_t i = 0; i < full; i += kNormSums) {
    for (std::size_t k = 0; k < kVecs; ++k) {
      ValueVec narrow;
      std::memcpy(&narrow, values + i + k * kWidth, sizeof narrow);
      const auto wide = __builtin_convertvector(narrow, DoubleVec);
      sums[k] += wide * wide;
    }
  }
  double ordered[kNormSums];
  std::memcpy(ordered, sums, sizeof ordered);
  for (std::size_t i = full; i < count; ++i) {
    const double wide = values[i];
    ordered[i - full] += wide * wide;
  }
  double total = 0;
  for (const double sum : ordered) total += sum;
  return total;
}

// Even and odd elements, as a PairLane has them, in the order of memory and back.
template <std::size_t... kAt>
inline void interleave(FloatVec even, FloatVec odd, float* to, std::index_sequence<kAt...>) {
  constexpr std::size_t kHalf = sizeof...(kAt) / 2;
  constexpr std::size_t kWidth = sizeof...(kAt);
  store_as(to, __builtin_shufflevector(even, odd, (kAt % 2 * kWidth + kAt / 2)...));
  store_as(to + kWidth, __builtin_shufflevector(even, odd, (kAt % 2 * kWidth + kHalf + kAt / 2)...));
}
template <std::size_t... kAt>
inline FloatVec every_second(FloatVec low, FloatVec high, std::index_sequence<kAt...>) {
  return __builtin_shufflevector(low, high, (2 * kAt)...);
}
template <std::size_t... kAt>
inline FloatVec every_other(FloatVec low, FloatVec high, std::index_sequence<kAt...>) {
  return __builtin_shufflevector(low, high, (2 * kAt + 1)...);
}
using Positions = std::make_index_sequence<kVecBytes / sizeof(float)>;

template <class Lane>
inline void store_floats(typename Lane::Vec value, float* to) {
  if constexpr (requires { value.even; }) {
    interleave(value.even, value.odd, to, Positions{});
  } else {
    store_as(to, value);
  }
}

template <class Lane>
inline typename Lane::Vec load_floats(const float* from) {
  if constexpr (requires(typename Lane::Vec value) { value.even; }) {
    const auto low = load_as<FloatVec>(from);
    const auto high = load_as<FloatVec>(from + kVecBytes / sizeof(float));
    return {every_second(low, high, Positions{}), every_other(low, high, Positions{})};
  } else {
    return load_as<typename Lane::Vec>(from);
  }
}

template <class Lane>
void widen(const void* from, float* to, std::size_t count) {
  const auto* const bytes = static_cast<const char*>(from);
  const std::size_t full = count - count % Lane::kWidth;
  for (std::size_t i = 0; i < full; i += Lane::kWidth) {
    store_floats<Lane>(Lane::load(bytes + i * Lane::kBytes, Lane::kWidth), to + i);
  }
  if (full == count) return;
  float tail[Lane::kWidth];
  store_floats<Lane>(Lane::load(bytes + full * Lane::kBytes, count - full), tail);
  std::memcpy(to + full, tail, (count - full) * sizeof(float));
}

template <class Lane>
void narrow(const float* from, void* to, std::size_t count) {
  auto* const bytes = static_cast<char*>(to);
  const std::size_t full = count - count % Lane::kWidth;
  for (std::size_t i = 0; i < full; i += Lane::kWidth) {
    Lane::store(bytes + i * Lane::kBytes, load_floats<Lane>(from + i), Lane::kWidth);
  }
  if (full == count) return;
  float tail[Lane::kWidth] = {};
  std::memcpy(tail, from + full, (count - full) * sizeof(float));
  Lane::store(bytes + full * Lane::kBytes, load_floats<Lane>(tail), count - full);
}

// constinit: no code of this file runs before a kernel is chosen.
extern constinit const StepKernels kStepKernels = {
    adamw,
    squared_norm<float>,
    squared_norm<double>,
    widen<Float16Lane>,
    widen<BFloat16Lane>,
    narrow<Float16Lane>,
    narrow<BFloat16Lane>,
};

}  // namespace pycomm::host::PYCOMM_SIMD_LEVEL
