// A library that is loaded at run time, and what is found in it. Never unloaded: NVIDIA's keep threads.
#pragma once

#include <dlfcn.h>

#include <string>
#include <string_view>
#include <vector>

#include "pycomm/error.hpp"

namespace pycomm {

class SharedLibrary {
 public:
  /// The first of `names` that loads; `what` says in errors what it is. "loaded:NAME": only if it is in the process
  /// already. Throws kUnavailable with the loader's reasons.
  SharedLibrary(std::string what, const std::vector<std::string>& names) : what_(std::move(what)) {
    constexpr std::string_view kLoaded = "loaded:";
    std::string reasons;
    for (const std::string& name : names) {
      const bool only_loaded = name.starts_with(kLoaded);
      const std::string file = only_loaded ? name.substr(kLoaded.size()) : name;
      handle_ = ::dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | (only_loaded ? RTLD_NOLOAD : 0));
      if (handle_ != nullptr) return;
      const char* const reason = ::dlerror();
      if (!only_loaded && reason != nullptr) reasons += (reasons.empty() ? "" : "; ") + std::string(reason);
    }
    throw Error(ErrorKind::kUnavailable, what_ + " cannot be loaded: " + reasons);
  }

  /// Store a function's address. Throws kUnavailable if there is none of that name.
  template <class Function>
  void get(Function& function, const char* symbol) const {
    function = reinterpret_cast<Function>(::dlsym(handle_, symbol));
    if (function != nullptr) return;
    throw Error(ErrorKind::kUnavailable, what_ + " has no " + symbol + ": it is too old, or another library");
  }

 private:
  std::string what_;
  void* handle_ = nullptr;
};

}  // namespace pycomm
