// The element types and reduce operators of every transport. Values are part of the wire format between ranks:
// append, never renumber.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycomm {

/// What a tensor's elements are, as its caller says. The first kNumNumberTypes have arithmetic of their own; the others
/// are only moved, or reduced as such numbers (arithmetic_of in call.hpp).
enum class DType : std::uint8_t {
  kFloat32 = 0,
  kFloat64 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
  kInt8 = 4,
  kUInt8 = 5,
  kInt32 = 6,
  kInt64 = 7,
  kBool = 8,
  kInt16 = 9,
  kUInt16 = 10,
  kUInt32 = 11,
  kUInt64 = 12,
  kComplex32 = 13,
  kComplex64 = 14,
  kComplex128 = 15,
  kFloat8E4M3FN = 16,
  kFloat8E5M2 = 17,
  kFloat8E4M3FNUZ = 18,
  kFloat8E5M2FNUZ = 19,
  kFloat8E8M0FNU = 20,
  kFloat4E2M1FNx2 = 21,  // two in a byte
};
inline constexpr int kNumNumberTypes = 8;
inline constexpr int kNumDTypes = 22;

enum class ReduceOp : std::uint8_t {
  kSum = 0,
  kAvg = 1,
  kMin = 2,
  kMax = 3,
  kProd = 4,
};
inline constexpr int kNumReduceOps = 5;

/// Bytes of an element.
constexpr std::size_t size_of(DType dtype) {
  constexpr std::size_t kSizes[] = {4, 8, 2, 2, 1, 1, 4, 8, 1, 2, 2, 4, 8, 4, 8, 16, 1, 1, 1, 1, 1, 1};
  static_assert(sizeof(kSizes) / sizeof(kSizes[0]) == kNumDTypes);
  return kSizes[static_cast<int>(dtype)];
}

constexpr bool is_floating_point(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

/// torch's name of it, without "torch.".
constexpr const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {
      "float32",         "float64",         "float16",        "bfloat16",        "int8",          "uint8",
      "int32",           "int64",           "bool",           "int16",           "uint16",        "uint32",
      "uint64",          "complex32",       "complex64",      "complex128",      "float8_e4m3fn", "float8_e5m2",
      "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"};
  static_assert(sizeof(kNames) / sizeof(kNames[0]) == kNumDTypes);
  return kNames[static_cast<int>(dtype)];
}

constexpr const char* name_of(ReduceOp op) {
  constexpr const char* kNames[] = {"sum", "avg", "min", "max", "prod"};
  return kNames[static_cast<int>(op)];
}

}  // namespace pycomm
