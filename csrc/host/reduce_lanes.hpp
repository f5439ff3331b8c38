// Lanes: how elements of one type are loaded into accumulators, and rounded and stored back. Used by
// reduce_kernels.hpp and compiled once per SIMD level, inside the namespace PYCOMM_SIMD_LEVEL: see there why.
//
// A lane has `Vec`, what one step of a loop computes with; `Acc`, the type of one accumulator; `kWidth`, the elements
// in a Vec; `kBytes`, the size of a stored element. A scalar Vec (kWidth 1) leaves the vectors to the compiler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pycomm::host::PYCOMM_SIMD_LEVEL {

// memcpy is how unaligned memory is read without undefined behaviour; it compiles to a plain move.
template <class T>
inline T load_as(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void store_as(void* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return load_as<To>(&from);
}

template <class T>
inline constexpr T kNaN = static_cast<T>(__builtin_nan(""));  // positive, quiet, no payload

// Which operand's payload an addition keeps depends on the order in which the compiler passes the operands, and the
// sign of a new NaN on the architecture. One pattern for all of them keeps results equal, and hides behind the loads.
template <class T, class Vec>
inline Vec canonical(Vec value) {
  return value != value ? kNaN<T> : value;
}

/// fp32, fp64 and integers: accumulated in their own type.
template <class T>
struct PlainLane {
  using Vec = T;
  using Acc = T;
  static constexpr std::size_t kWidth = 1;
  static constexpr std::size_t kBytes = sizeof(T);

  static Vec load(const char* from, std::size_t) { return load_as<T>(from); }
  static void store(char* to, Vec value, std::size_t) {
    if constexpr (std::is_floating_point_v<T>) value = canonical<T>(value);
    store_as<T>(to, value);
  }
  static Vec load_acc(const Acc* from) { return *from; }
  static void store_acc(Acc* to, Vec value) { *to = value; }
};

#if defined(__AVX512F__)
inline constexpr std::size_t kVecBytes = 64;
#elif defined(__AVX2__)
inline constexpr std::size_t kVecBytes = 32;
#else
inline constexpr std::size_t kVecBytes = 16;
#endif
typedef float FloatVec __attribute__((vector_size(kVecBytes)));
typedef std::int32_t IntVec __attribute__((vector_size(kVecBytes)));
typedef std::uint32_t BitsVec __attribute__((vector_size(kVecBytes)));  // a cast from FloatVec keeps the bits

/// 16-bit floats, two to a 32-bit word: even and odd elements become one vector of fp32 each, so that nothing is
/// shuffled. (GCC's own vectors of 16-bit elements are three times slower.) Format says how to convert.
template <class Format>
struct PairLane {
  struct Vec {
    FloatVec even, odd;
    Vec operator/(float divisor) const { return {even / divisor, odd / divisor}; }
  };
  using Acc = float;
  static constexpr std::size_t kBytes = 2;
  static constexpr std::size_t kWidth = kVecBytes / kBytes;

  // num < kWidth only at the end of a buffer.
  static Vec load(const char* from, std::size_t num) {
    BitsVec packed{};
    std::memcpy(&packed, from, num * kBytes);
    return {Format::widen_even(packed), Format::widen_odd(packed)};
  }
  static void store(char* to, Vec value, std::size_t num) {
    const BitsVec packed = Format::narrow(value.even, value.odd);
    std::memcpy(to, &packed, num * kBytes);
  }
  static Vec load_acc(const float* from) { return {load_as<FloatVec>(from), load_as<FloatVec>(from + kWidth / 2)}; }
  static void store_acc(float* to, Vec value) {
    store_as(to, value.even);
    store_as(to + kWidth / 2, value.odd);
  }
};

/// bfloat16: the upper half of an fp32. Integer instructions only, so the processor's denormal mode does not matter
/// (the AVX512_BF16 instructions flush denormals, which is why they are not used).
struct BFloat16Format {
  static FloatVec widen_even(BitsVec packed) { return (FloatVec)(packed << 16); }
  static FloatVec widen_odd(BitsVec packed) { return (FloatVec)(packed & 0xffff0000U); }

  static BitsVec narrow(FloatVec even, FloatVec odd) { return (rounded(even) >> 16) | (rounded(odd) & 0xffff0000U); }
  static BitsVec rounded(FloatVec value) {  // to nearest, ties to even, in the upper half
    const auto bits = (BitsVec)value;
    const BitsVec nearest = bits + 0x7fffU + ((bits >> 16) & 1U);
    return value != value ? 0x7fc00000U : nearest;
  }
};
using BFloat16Lane = PairLane<BFloat16Format>;

#if defined(__F16C__) || defined(__aarch64__)

/// float16 with the processor's conversions, which GCC does not use in vectors by itself.
struct Float16Lane {
  using Vec = FloatVec;
  using Acc = float;
#if defined(__AVX512F__)
  using Packed = __m256i;
  static constexpr __mmask16 kAll = 0xffff;  // the forms without a mask make GCC 12 warn of uninitialized values
#elif defined(__F16C__)
  using Packed = __m128i;
#else
  using Packed = float16x4_t;
#endif
  static constexpr std::size_t kWidth = kVecBytes / sizeof(float);
  static constexpr std::size_t kBytes = 2;

  static Vec widen(Packed packed) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(kAll, packed);
#elif defined(__F16C__)
    return _mm256_cvtph_ps(packed);
#else
    return vcvt_f32_f16(packed);
#endif
  }
  static Packed narrow(Vec value) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtps_ph(kAll, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return vcvt_f16_f32(value);
#endif
  }

  // num < kWidth only at the end of a buffer.
  static Vec load(const char* from, std::size_t num) {
    Packed packed{};
    std::memcpy(&packed, from, num * kBytes);
    return widen(packed);
  }
  static void store(char* to, Vec value, std::size_t num) {
    const Packed packed = narrow(canonical<float>(value));
    std::memcpy(to, &packed, num * kBytes);
  }
  static Vec load_acc(const float* from) { return load_as<Vec>(from); }
  static void store_acc(float* to, Vec value) { store_as(to, value); }
};

#else

/// float16 where the processor cannot convert: bit-identical to the instructions.
struct Float16Format {
  static FloatVec widen_even(BitsVec packed) { return widen((IntVec)(packed & 0xffffU)); }
  static FloatVec widen_odd(BitsVec packed) { return widen((IntVec)(packed >> 16)); }
  static BitsVec narrow(FloatVec even, FloatVec odd) { return rounded(even) | (rounded(odd) << 16); }

  static FloatVec widen(IntVec half) {
    const IntVec shifted = (half & 0x7fff) << 13;  // exponent and fraction where fp32 has them
    const IntVec exponent = shifted & 0x0f800000;
    const IntVec normal = shifted + ((127 - 15) << 23);
    const IntVec special = normal + ((128 - 16) << 23);  // infinity and NaN: all ones again
    // Subnormal m * 2^-24: let the subtraction (1 + m/1024) * 2^-14 - 2^-14, which is exact, normalise it.
    const auto subnormal = (IntVec)((FloatVec)(shifted + (113 << 23)) - 0x1p-14F);
    const IntVec finite = exponent == 0 ? subnormal : normal;
    const IntVec magnitude = exponent == 0x0f800000 ? special : finite;
    return (FloatVec)(magnitude | ((half & 0x8000) << 16));
  }

  static BitsVec rounded(FloatVec value) {  // to nearest, ties to even, in the lower half
    const auto bits = (IntVec)value;
    const IntVec magnitude = bits & 0x7fffffff;
    const IntVec normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14 the result counts in units of 2^-24: adding 0.5, whose last place is 2^-24, rounds to just that.
    const IntVec subnormal = (IntVec)((FloatVec)magnitude + 0.5F) - (126 << 23);
    const IntVec small = magnitude < (113 << 23) ? subnormal : normal;
    const IntVec finite = magnitude >= 0x477ff000 ? 0x7c00 : small;  // 65520 and above round to infinity
    const IntVec half = finite | (IntVec)(((BitsVec)bits >> 16) & 0x8000U);
    return (BitsVec)(value != value ? 0x7e00 : half);
  }
};
using Float16Lane = PairLane<Float16Format>;

#endif

}  // namespace pycomm::host::PYCOMM_SIMD_LEVEL
