// A tensor argument: read from its Python object, and checked for what every call needs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bindings/dlpack.hpp"
#include "pycomm/types.hpp"

namespace pycomm::bindings {

inline constexpr dlpack::Device kHost{dlpack::kCpu, 0};

/// What a call does with a tensor.
enum class Access { kRead, kWrite };

/// A contiguous tensor on the device of its communicator. Its memory belongs to the Python object.
class Tensor {
 public:
  /// `name`: what messages call it. Arrays that are no tensors come through their `__dlpack__`.
  /// `device`: where it has to be; none: anywhere. Throws py::type_error if it is neither, py::value_error if it is
  /// elsewhere, not contiguous, of an unknown dtype, or read-only where it is to be written.
  Tensor(pybind11::handle argument, const char* name, Access access, std::optional<dlpack::Device> device = kHost);

  void* data() const { return static_cast<std::byte*>(view_.data) + view_.byte_offset; }
  std::uint64_t count() const { return count_; }
  std::uint64_t bytes() const { return count_ * size_of(dtype_); }
  int num_dims() const { return view_.num_dims; }
  std::uint64_t rows() const { return static_cast<std::uint64_t>(view_.shape[0]); }
  DType dtype() const { return dtype_; }
  /// The tensor itself, or the torch tensor that was made of an array.
  pybind11::handle object() const { return object_; }
  pybind11::object attribute(const char* name) const { return object_.attr(name); }
  std::string shape_text() const;  // "(2, 3)"
  const char* name() const { return name_; }

 private:
  bool is_contiguous() const;
  bool read(const dlpack::ExchangeApi& api);
  void convert(pybind11::handle argument, Access access);
  void check_resolved() const;
  void check_device(dlpack::Device device) const;
  [[noreturn]] void refuse_device(dlpack::Device device) const;
  [[noreturn]] void refuse_unreadable(std::optional<dlpack::Device> device) const;

  const char* name_;
  pybind11::handle object_;
  pybind11::object converted_;  // keeps object_, if it was made here
  dlpack::Tensor view_;
  DType dtype_ = DType::kUInt8;
  std::uint64_t count_ = 1;
};

}  // namespace pycomm::bindings
