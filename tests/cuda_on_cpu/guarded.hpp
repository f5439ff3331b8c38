// For functions that ctypes calls: null, or what went wrong.
#pragma once

#include <exception>
#include <string>

namespace cuda_on_cpu {

template <class Function>
const char* guarded(Function function) {
  static std::string message;
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace cuda_on_cpu
