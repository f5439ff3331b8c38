// For functions that take addresses and names from Python, for tests and measurements: whoever calls them answers for
// the memory behind the addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/names.hpp"

namespace pycomm::bindings {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;

inline DType parse_dtype(const std::string& name) { return parse<DType>(name, kNumDTypes, "dtype"); }
inline ReduceOp parse_op(const std::string& name) { return parse<ReduceOp>(name, kNumReduceOps, "reduce op"); }

/// Throws std::invalid_argument for an empty list, and for a null pointer where there are elements.
template <class Pointer>
std::vector<Pointer> pointers(const Addresses& addresses, std::size_t count, const char* what) {
  if (addresses.empty()) throw std::invalid_argument(std::string(what) + " is empty");
  std::vector<Pointer> result;
  for (const Address address : addresses) {
    if (address == 0 && count > 0) throw std::invalid_argument(std::string(what) + " holds a null pointer");
    result.push_back(reinterpret_cast<Pointer>(address));
  }
  return result;
}

template <class Type>
Type* pointer(Address address) {
  return reinterpret_cast<Type*>(address);
}

}  // namespace pycomm::bindings
