// Reductions of eight elements over ranks, to the bit as on the host (csrc/host/reduce_kernels.hpp,
// docs/determinism.md): start from rank 0's value, combine the others in rank order; 16-bit floats accumulate in fp32
// and round once; avg divides once, in the accumulator; integers wrap; NaN propagates and is stored in one form; one
// rank copies its bits. Needs -fmad=false.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/convert.cuh"
#include "cuda/device/vec.cuh"
#include "pycomm/types.hpp"

namespace pycomm::cuda {

template <class T>
inline constexpr bool kIsSmallFloat = std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>;

template <class T>
using Accumulator = std::conditional_t<kIsSmallFloat<T>, float, T>;

template <class T>
__device__ inline Accumulator<T> widened(T value) {
  if constexpr (kIsSmallFloat<T>) {
    return to_float(value);
  } else {
    return value;
  }
}

/// An accumulator as it is stored in T.
template <class T, class Acc>
__device__ inline T rounded(Acc value) {
  if constexpr (kIsSmallFloat<T>) {
    return from_float<T>(value);
  } else if constexpr (std::is_floating_point_v<T>) {
    return value != value ? static_cast<T>(__builtin_nanf("")) : value;
  } else {
    return value;
  }
}

/// Sum and product in unsigned arithmetic, of an int at least, so that they wrap.
template <class Acc>
__device__ inline Acc sum(Acc a, Acc b) {
  if constexpr (std::is_integral_v<Acc>) {
    return static_cast<Acc>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
  } else {
    return a + b;
  }
}
template <class Acc>
__device__ inline Acc product(Acc a, Acc b) {
  if constexpr (std::is_integral_v<Acc>) {
    return static_cast<Acc>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
  } else {
    return a * b;
  }
}
/// Of equal values (zeros of different sign) the earlier rank's; NaN if either is.
template <class Acc>
__device__ inline Acc smaller(Acc a, Acc b) {
  return b != b || b < a ? b : a;
}
template <class Acc>
__device__ inline Acc larger(Acc a, Acc b) {
  return b != b || b > a ? b : a;
}

/// acc[i] = acc[i] op value[i]. The operator is looked at once for eight elements.
template <class T>
__device__ inline void combine(ReduceOp op, Accumulator<T> (&acc)[kGroup], const Elements<T>& values) {
  const auto each = [&](auto function) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) acc[i] = function(acc[i], widened(values.at[i]));
  };
  using Acc = Accumulator<T>;
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kAvg:
      return each([](Acc a, Acc b) { return sum(a, b); });
    case ReduceOp::kMin:
      return each([](Acc a, Acc b) { return smaller(a, b); });
    case ReduceOp::kMax:
      return each([](Acc a, Acc b) { return larger(a, b); });
    case ReduceOp::kProd:
      return each([](Acc a, Acc b) { return product(a, b); });
  }
}

/// acc = elements [at, at + num) of source(0) op source(1) op … op source(num_sources - 1), divided for avg.
template <class T, class Source>
__device__ inline void reduce(const Source& source, int num_sources, std::int64_t at, int num, ReduceOp op,
                              Accumulator<T> (&acc)[kGroup]) {
  // Loads of several ranks are under way at once; 128 bytes of them keep clear of spills.
  constexpr int kAhead = sizeof(T) == 8 ? 2 : 4;
  for (int first = 0; first < num_sources; first += kAhead) {
    Elements<T> values[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + k < num_sources) values[k] = load(source(first + k) + at, num);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + k >= num_sources) break;
      if (k == 0 && first == 0) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) acc[i] = widened(values[0].at[i]);
      } else {
        combine<T>(op, acc, values[k]);
      }
    }
  }
  if constexpr (!std::is_integral_v<T>) {
    if (op == ReduceOp::kAvg) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) acc[i] /= static_cast<Accumulator<T>>(num_sources);
    }
  }
}

/// The same, stored as Out. One source of the same type keeps its bits, NaN payloads included.
template <class In, class Out, class Source>
__device__ inline Elements<Out> reduced(const Source& source, int num_sources, std::int64_t at, int num, ReduceOp op) {
  if constexpr (std::is_same_v<In, Out>) {
    if (num_sources == 1) return load(source(0) + at, num);
  }
  Accumulator<In> acc[kGroup];
  reduce<In>(source, num_sources, at, num, op, acc);
  Elements<Out> result;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) result.at[i] = rounded<Out>(acc[i]);
  return result;
}

/// Adds the squares of elements [0, num) to `total`, in order. Squares of fp32 are exact in fp64.
template <class T>
__device__ inline void add_squares(double& total, const Elements<T>& values, int num) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const auto value = static_cast<double>(widened(values.at[i]));
    if (i < num) total += value * value;
  }
}

}  // namespace pycomm::cuda
