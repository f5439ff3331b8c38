// A library that is loaded at run time, and what is found in it. Never unloaded: NCCL and the driver have threads.
#pragma once

#include <string>
#include <vector>

namespace pycomm::nccl {

class SharedLibrary {
 public:
  /// The first of `names` that loads; `what` says in errors what it is. "loaded:NAME": only if it is in the process
  /// already. Throws kUnavailable with the loader's reasons.
  SharedLibrary(const std::string& what, const std::vector<std::string>& names);

  /// Where it was loaded from.
  const std::string& file() const { return file_; }
  bool has(const char* symbol) const { return find(symbol) != nullptr; }

  /// Store a function's address. Throws kUnavailable if there is none of that name.
  template <class Function>
  void get(Function& function, const char* symbol) const {
    if (void* const found = find(symbol)) {
      function = reinterpret_cast<Function>(found);
    } else {
      refuse(symbol);
    }
  }
  /// nullptr if there is none.
  template <class Function>
  void get_optional(Function& function, const char* symbol) const {
    function = reinterpret_cast<Function>(find(symbol));
  }

 private:
  void* find(const char* symbol) const;
  [[noreturn]] void refuse(const char* symbol) const;

  std::string what_;
  void* handle_ = nullptr;
  std::string file_;
};

}  // namespace pycomm::nccl
