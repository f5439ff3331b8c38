// Element types that are stored in 16 or 8 bits, and their conversions: to nearest even, as docs/determinism.md says.
// Every NaN that is made has one form: 0x7e00 (float16), 0x7fc0 (bfloat16), 0x7f (both 8-bit formats).
//
// namespace portable has the definition in integer arithmetic; on devices, instructions with the same results stand in.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pycomm::cuda {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};
/// OCP 8-bit floats. Values beyond the largest finite one, infinity included, become that one ("satfinite").
struct Float8E4M3 {
  std::uint8_t bits;
};
struct Float8E5M2 {
  std::uint8_t bits;
};

__host__ __device__ inline float float_of_bits(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}
__host__ __device__ inline std::uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

namespace portable {

__host__ __device__ inline float to_float(Float16 value) {
  const std::uint32_t shifted = (value.bits & 0x7fffU) << 13;  // exponent and fraction where float32 has them
  const std::uint32_t exponent = shifted & 0x0f800000U;
  std::uint32_t magnitude = shifted + ((127U - 15U) << 23);
  if (exponent == 0x0f800000U) magnitude += (128U - 16U) << 23;  // infinity and NaN: all ones again
  // Subnormal m * 2^-24: the subtraction (1 + m/1024) * 2^-14 - 2^-14, which is exact, normalises it.
  if (exponent == 0) magnitude = bits_of_float(float_of_bits(shifted + (113U << 23)) - 0x1p-14F);
  return float_of_bits(magnitude | ((value.bits & 0x8000U) << 16));
}

__host__ __device__ inline Float16 to_float16(float value) {
  const std::uint32_t bits = bits_of_float(value);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  std::uint32_t half = (magnitude - ((127U - 15U) << 23) + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  // Below 2^-14 the result counts in units of 2^-24: adding 0.5, whose last place is 2^-24, rounds to just that.
  if (magnitude < (113U << 23)) half = bits_of_float(float_of_bits(magnitude) + 0.5F) - (126U << 23);
  if (magnitude >= 0x477ff000U) half = 0x7c00U;  // 65520 and above round to infinity
  half |= (bits >> 16) & 0x8000U;
  if (magnitude > 0x7f800000U) half = 0x7e00U;
  return {static_cast<std::uint16_t>(half)};
}

__host__ __device__ inline BFloat16 to_bfloat16(float value) {
  const std::uint32_t bits = bits_of_float(value);
  const std::uint32_t nearest = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  return {static_cast<std::uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? 0x7fc0U : nearest)};
}

/// kMantissa bits of fraction, exponents biased by kBias, kLargest the code of the largest finite value.
template <int kMantissa, int kBias, unsigned kLargest>
__host__ __device__ inline std::uint8_t to_float8(float value) {
  const std::uint32_t bits = bits_of_float(value);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return 0x7f;
  constexpr int kDropped = 23 - kMantissa;
  std::uint32_t code = ((magnitude + (1U << (kDropped - 1)) - 1 + ((magnitude >> kDropped) & 1U)) >> kDropped) -
                       ((127U - kBias) << kMantissa);
  // Below the smallest normal value the result counts in units of 2^(1 - bias - mantissa): as for float16.
  constexpr std::uint32_t kUnitAtLastPlace = (127U + 23 + 1 - kBias - kMantissa) << 23;
  if (magnitude < ((128U - kBias) << 23)) {
    code = bits_of_float(float_of_bits(magnitude) + float_of_bits(kUnitAtLastPlace)) - kUnitAtLastPlace;
  }
  if (code > kLargest) code = kLargest;
  return static_cast<std::uint8_t>(code | ((bits >> 24) & 0x80U));
}
__host__ __device__ inline Float8E4M3 to_float8_e4m3(float value) { return {to_float8<3, 7, 0x7e>(value)}; }
__host__ __device__ inline Float8E5M2 to_float8_e5m2(float value) { return {to_float8<2, 15, 0x7b>(value)}; }

__host__ __device__ inline float to_float(Float8E4M3 value) {
  const std::uint32_t code = value.bits & 0x7fU;
  float magnitude = static_cast<float>(code) * 0x1p-9F;  // subnormal
  if (code >= 8) magnitude = float_of_bits((code << 20) + ((127U - 7U) << 23));
  if (code == 0x7f) magnitude = float_of_bits(0x7fc00000U);
  return float_of_bits(bits_of_float(magnitude) | ((value.bits & 0x80U) << 24));
}
/// Float16 without the lower half of its fraction.
__host__ __device__ inline float to_float(Float8E5M2 value) {
  return to_float(Float16{static_cast<std::uint16_t>(value.bits << 8)});
}

}  // namespace portable

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(BFloat16 value) { return float_of_bits(static_cast<std::uint32_t>(value.bits) << 16); }
__device__ inline float to_float(Float8E4M3 value) { return portable::to_float(value); }
__device__ inline float to_float(Float8E5M2 value) { return portable::to_float(value); }

__device__ inline float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return portable::to_float(value);
#endif
}

/// Rounded to T; one overload a type would not let templates name the target.
template <class T>
__device__ inline T from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
  return value;
}

template <>
__device__ inline Float16 from_float<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {value != value ? std::uint16_t{0x7e00} : bits};  // the instruction's NaN is 0x7fff
#else
  return portable::to_float16(value);
#endif
}

template <>
__device__ inline BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  std::uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {value != value ? std::uint16_t{0x7fc0} : bits};  // the instruction's NaN is 0x7fff
#else
  return portable::to_bfloat16(value);
#endif
}

template <>
__device__ inline Float8E4M3 from_float<Float8E4M3>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0F), "f"(value));
  return {static_cast<std::uint8_t>(value != value ? 0x7f : pair & 0xff)};
#else
  return portable::to_float8_e4m3(value);
#endif
}

template <>
__device__ inline Float8E5M2 from_float<Float8E5M2>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0F), "f"(value));
  return {static_cast<std::uint8_t>(value != value ? 0x7f : pair & 0xff)};
#else
  return portable::to_float8_e5m2(value);
#endif
}

}  // namespace pycomm::cuda
