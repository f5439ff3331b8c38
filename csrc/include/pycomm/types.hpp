// The element types and reduce operators of every transport. Values are part of the wire format between ranks:
// append, never renumber.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycomm {

enum class DType : std::uint8_t {
  kFloat32 = 0,
  kFloat64 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
  kInt8 = 4,
  kUInt8 = 5,
  kInt32 = 6,
  kInt64 = 7,
};
inline constexpr int kNumDTypes = 8;

enum class ReduceOp : std::uint8_t {
  kSum = 0,
  kAvg = 1,
  kMin = 2,
  kMax = 3,
  kProd = 4,
};
inline constexpr int kNumReduceOps = 5;

constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt8:
    case DType::kUInt8:
      return 1;
  }
  return 0;
}

constexpr bool is_floating_point(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

constexpr const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64"};
  return kNames[static_cast<int>(dtype)];
}

constexpr const char* name_of(ReduceOp op) {
  constexpr const char* kNames[] = {"sum", "avg", "min", "max", "prod"};
  return kNames[static_cast<int>(op)];
}

}  // namespace pycomm
