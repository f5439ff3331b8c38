// The reduction loops, compiled once per SIMD level: each reduce_<level>.cpp defines PYCOMM_SIMD_LEVEL and includes
// this file. Everything lies in that level's namespace, and no inline function from elsewhere is called that could
// outlive inlining: the linker keeps one copy of such a function, and an AVX-512 copy would crash older processors.
//
// Few sources that are also the destinations (each rank reducing its slice of everyone's buffer in place) are one
// pass. Anything else is combined in blocks whose accumulators stay in the L1 cache: the first two sources fill the
// block, the last one is combined on the way to the first destination, and the others get copies.
#pragma once

#ifndef PYCOMM_SIMD_LEVEL
#error "define PYCOMM_SIMD_LEVEL, the namespace of this SIMD level, before including this file"
#endif

#include "host/reduce_lanes.hpp"
#include "host/reduce_levels.hpp"

namespace pycomm::host::PYCOMM_SIMD_LEVEL {

// Operators on scalars and on vectors of the compiler's vector extension. NaN in either operand gives NaN. Where two
// zeros of different sign meet, min and max keep the earlier rank's. Sum and Prod get integers as unsigned: those wrap.
struct Sum {
  template <class Vec>
  static Vec apply(Vec a, Vec b) {
    return static_cast<Vec>(a + b);
  }
};
struct Prod {
  template <class Vec>
  static Vec apply(Vec a, Vec b) {
    return static_cast<Vec>(a * b);
  }
};
struct Min {
  template <class Vec>
  static Vec apply(Vec a, Vec b) {
    const Vec smaller = b < a ? b : a;
    return b != b ? b : smaller;
  }
};
struct Max {
  template <class Vec>
  static Vec apply(Vec a, Vec b) {
    const Vec larger = b > a ? b : a;
    return b != b ? b : larger;
  }
};

// Op on whatever a lane computes with: for PairLane, on the even and on the odd elements.
template <class Op, class Vec>
inline Vec combine(Vec a, Vec b) {
  if constexpr (requires { a.even; }) {
    return {Op::apply(a.even, b.even), Op::apply(a.odd, b.odd)};
  } else {
    return Op::apply(a, b);
  }
}

#if defined(__clang__)
#define PYCOMM_INDEPENDENT  // Clang has no such hint; it tests for overlap at run time
#else
#define PYCOMM_INDEPENDENT _Pragma("GCC ivdep")
#endif

// Calls step(first element, number of elements) for all of [0, count): full Vecs, then what is left.
// A destination is a source with the same start or does not overlap any, so the iterations are independent.
template <class Lane, class Step>
inline void for_each_vec(std::size_t count, Step step) {
  const std::size_t full = count - count % Lane::kWidth;
  PYCOMM_INDEPENDENT
  for (std::size_t i = 0; i < full; i += Lane::kWidth) step(i, Lane::kWidth);
  if constexpr (Lane::kWidth > 1) {
    if (full < count) step(full, count - full);
  }
}

template <class Lane, bool kAvg>
inline typename Lane::Vec divided(typename Lane::Vec value, typename Lane::Acc num_src) {
  if constexpr (kAvg) return value / num_src;
  return value;
}

#define PYCOMM_INLINE __attribute__((always_inline))
#define PYCOMM_NOINLINE __attribute__((noinline))  // one copy of each loop: a call per block costs nothing

// Pointers that the loops keep in registers: the compiler must not think that a store changes them.
template <class Pointer, int kNum>
struct Pointers {
  Pointer at[kNum];
};

// src[0] op src[1] op … op src[kNum - 1], at one place
template <class Lane, class Op, int kNum, int kAll>
inline typename Lane::Vec combine_first(const Pointers<const char*, kAll>& src, std::size_t at, std::size_t num) {
  if constexpr (kNum == 1) {
    return Lane::load(src.at[0] + at, num);
  } else {
    const auto value = combine_first<Lane, Op, kNum - 1>(src, at, num);
    return combine<Op>(value, Lane::load(src.at[kNum - 1] + at, num));
  }
}

template <class Lane, int kNum, int kAll>
inline void store_to_first(const Pointers<char*, kAll>& dst, std::size_t at, typename Lane::Vec value,
                           std::size_t num) {
  if constexpr (kNum > 1) store_to_first<Lane, kNum - 1>(dst, at, value, num);
  Lane::store(dst.at[kNum - 1] + at, value, num);
}

// dst[0 … kDst - 1] = src[0] op … op src[kSrc - 1], in one pass from byte `offset` of every buffer
template <class Lane, class Op, bool kAvg, int kSrc, int kDst>
PYCOMM_NOINLINE void reduce_in_one_pass(const void* const* src, void* const* dst, std::size_t offset,
                                        std::size_t count) {
  Pointers<const char*, kSrc> from;
  Pointers<char*, kDst> to;
  for (int j = 0; j < kSrc; ++j) from.at[j] = static_cast<const char*>(src[j]) + offset;
  for (int k = 0; k < kDst; ++k) to.at[k] = static_cast<char*>(dst[k]) + offset;
  for_each_vec<Lane>(count, [=](std::size_t i, std::size_t num) PYCOMM_INLINE {
    const std::size_t at = i * Lane::kBytes;
    const auto value = combine_first<Lane, Op, kSrc>(from, at, num);
    store_to_first<Lane, kDst>(to, at, divided<Lane, kAvg>(value, kSrc), num);
  });
}

inline constexpr std::size_t kBlock = 1024;  // accumulators; a multiple of every kWidth

// acc = a op b
template <class Lane, class Op>
PYCOMM_NOINLINE void start_block(const char* a, const char* b, typename Lane::Acc* acc, std::size_t count) {
  for_each_vec<Lane>(count, [=](std::size_t i, std::size_t num) PYCOMM_INLINE {
    const std::size_t at = i * Lane::kBytes;
    Lane::store_acc(acc + i, combine<Op>(Lane::load(a + at, num), Lane::load(b + at, num)));
  });
}

// acc = acc op next
template <class Lane, class Op>
PYCOMM_NOINLINE void continue_block(const char* next, typename Lane::Acc* acc, std::size_t count) {
  for_each_vec<Lane>(count, [=](std::size_t i, std::size_t num) PYCOMM_INLINE {
    const auto value = Lane::load_acc(acc + i);
    Lane::store_acc(acc + i, combine<Op>(value, Lane::load(next + i * Lane::kBytes, num)));
  });
}

// dst = acc op last, divided and rounded
template <class Lane, class Op, bool kAvg>
PYCOMM_NOINLINE void finish_block(const char* last, const typename Lane::Acc* acc, int num_src, char* dst,
                                  std::size_t count) {
  const auto divisor = static_cast<typename Lane::Acc>(num_src);
  for_each_vec<Lane>(count, [=](std::size_t i, std::size_t num) PYCOMM_INLINE {
    const std::size_t at = i * Lane::kBytes;
    const auto value = combine<Op>(Lane::load_acc(acc + i), Lane::load(last + at, num));
    Lane::store(dst + at, divided<Lane, kAvg>(value, divisor), num);
  });
}

#undef PYCOMM_INLINE
#undef PYCOMM_NOINLINE
#undef PYCOMM_INDEPENDENT

inline void copy_to_each(const char* from, void* const* dst, int num_dst, std::size_t offset, std::size_t bytes) {
  for (int k = 0; k < num_dst; ++k) {
    char* const to = static_cast<char*>(dst[k]) + offset;
    if (to != from) std::memcpy(to, from, bytes);
  }
}

template <class Lane, class Op, bool kAvg>
void reduce_in_blocks(const void* const* src, int num_src, void* const* dst, int num_dst, std::size_t count) {
  const auto source = [src](int j) { return static_cast<const char*>(src[j]); };
  alignas(64) typename Lane::Acc acc[kBlock];
  for (std::size_t first = 0; first < count; first += kBlock) {
    const std::size_t num = count - first < kBlock ? count - first : kBlock;
    const std::size_t at = first * Lane::kBytes;
    char* const out = static_cast<char*>(dst[0]) + at;
    if (num_src == 2) {
      reduce_in_one_pass<Lane, Op, kAvg, 2, 1>(src, dst, at, num);
    } else {
      start_block<Lane, Op>(source(0) + at, source(1) + at, acc, num);
      for (int j = 2; j < num_src - 1; ++j) continue_block<Lane, Op>(source(j) + at, acc, num);
      finish_block<Lane, Op, kAvg>(source(num_src - 1) + at, acc, num_src, out, num);
    }
    copy_to_each(out, dst + 1, num_dst - 1, at, num * Lane::kBytes);
  }
}

template <class Lane, class Op, bool kAvg = false>
void reduce(const void* const* src, int num_src, void* const* dst, int num_dst, std::size_t count) {
  if (count == 0) return;  // the pointers may be null
  if (num_src == 1) {
    return copy_to_each(static_cast<const char*>(src[0]), dst, num_dst, 0, count * Lane::kBytes);
  }
  if (num_src == 2 && num_dst == 1) return reduce_in_one_pass<Lane, Op, kAvg, 2, 1>(src, dst, 0, count);
  if (num_src == 2 && num_dst == 2) return reduce_in_one_pass<Lane, Op, kAvg, 2, 2>(src, dst, 0, count);
  // Gradients of three or four ranks: twice as fast as blocks. Not worth its size for the other operators.
  if constexpr (std::is_same_v<Op, Sum>) {
    if (num_src == 3 && num_dst == 3) return reduce_in_one_pass<Lane, Op, kAvg, 3, 3>(src, dst, 0, count);
    if (num_src == 4 && num_dst == 4) return reduce_in_one_pass<Lane, Op, kAvg, 4, 4>(src, dst, 0, count);
  }
  reduce_in_blocks<Lane, Op, kAvg>(src, num_src, dst, num_dst, count);
}

// Columns in the order of ReduceOp, rows in that of DType.
#define PYCOMM_FLOAT_ROW(Lane) \
  {reduce<Lane, Sum>, reduce<Lane, Sum, true>, reduce<Lane, Min>, reduce<Lane, Max>, reduce<Lane, Prod>}
#define PYCOMM_INT_ROW(T, Unsigned)                                                                 \
  {reduce<PlainLane<Unsigned>, Sum>, nullptr, reduce<PlainLane<T>, Min>, reduce<PlainLane<T>, Max>, \
   reduce<PlainLane<Unsigned>, Prod>}

// constinit: no code of this file runs before a kernel is chosen.
extern constinit const ReduceTable kReduceTable = {{
    PYCOMM_FLOAT_ROW(PlainLane<float>),
    PYCOMM_FLOAT_ROW(PlainLane<double>),
    PYCOMM_FLOAT_ROW(Float16Lane),
    PYCOMM_FLOAT_ROW(BFloat16Lane),
    PYCOMM_INT_ROW(std::int8_t, std::uint8_t),
    PYCOMM_INT_ROW(std::uint8_t, std::uint8_t),
    PYCOMM_INT_ROW(std::int32_t, std::uint32_t),
    PYCOMM_INT_ROW(std::int64_t, std::uint64_t),
}};

#undef PYCOMM_FLOAT_ROW
#undef PYCOMM_INT_ROW

}  // namespace pycomm::host::PYCOMM_SIMD_LEVEL
