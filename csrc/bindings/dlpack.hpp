// What is used here of DLPack's C exchange interface, major version 1: the way from an array's Python object to its
// pointer, shape and dtype in one C call, without libtorch and without an allocation. Layouts as the standard has them
// (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace pycomm::bindings::dlpack {

inline constexpr std::uint32_t kMajorVersion = 1;

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : std::uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBFloat = 4,
  kComplex = 5,
  kBool = 6,
  kFloat8E4M3FN = 10,
  kFloat8E4M3FNUZ = 11,
  kFloat8E5M2 = 12,
  kFloat8E5M2FNUZ = 13,
  kFloat8E8M0FNU = 14,
  kFloat4E2M1FN = 17,
};

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t num_dims;
  DataType dtype;
  const std::int64_t* shape;
  const std::int64_t* strides;  // elements
  std::uint64_t byte_offset;
};

/// What a capsule "dltensor" has, for whoever takes it, renames it, and calls `deleter` in the end.
struct ManagedTensor {
  static constexpr const char* kCapsule = "dltensor";

  Tensor tensor;
  void* owner;
  void (*deleter)(ManagedTensor* self);
};

/// The head of what a capsule "dltensor_versioned" has.
struct VersionedTensor {
  static constexpr const char* kCapsule = "dltensor_versioned";
  static constexpr std::uint64_t kReadOnly = 1;

  std::uint32_t major_version;
  std::uint32_t minor_version;
  void* owner;
  void (*deleter)(VersionedTensor* self);
  std::uint64_t flags;
};

/// In the capsule `__dlpack_c_exchange_api__` of an array's class.
struct ExchangeApi {
  static constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
  static constexpr const char* kCapsule = "dlpack_exchange_api";

  std::uint32_t major_version;
  std::uint32_t minor_version;
  const ExchangeApi* previous;
  void* unused[3];
  int (*tensor_from_object)(void* object, Tensor* tensor);  // borrows; nonzero: a Python error is set
  void* unused_stream;
};

}  // namespace pycomm::bindings::dlpack
