// Enumerators by the names that Python has for them.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "pycomm/types.hpp"

namespace pycomm::bindings {

/// The enumerator called `name`, of `num_values` from 0. Throws std::invalid_argument that lists the names.
template <class Enum>
Enum parse(std::string_view name, int num_values, const char* what) {
  std::string known;
  for (int value = 0; value < num_values; ++value) {
    const Enum candidate = static_cast<Enum>(value);
    if (name == name_of(candidate)) return candidate;
    known += (value == 0 ? "" : ", ") + std::string(name_of(candidate));
  }
  throw std::invalid_argument("unknown " + std::string(what) + " \"" + std::string(name) + "\": it is one of " + known);
}

}  // namespace pycomm::bindings
