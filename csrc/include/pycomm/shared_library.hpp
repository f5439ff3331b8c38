// A library that is loaded at run time, and what is found in it. Never unloaded: NVIDIA's keep threads.
#pragma once

#include <dlfcn.h>
#include <link.h>

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
      const char* const reason = ::dlerror();  // none if it merely is not loaded yet
      if (!only_loaded && reason != nullptr) reasons += (reasons.empty() ? "" : "; ") + std::string(reason);
    }
    throw Error(ErrorKind::kUnavailable, what_ + " cannot be loaded: " + reasons);
  }

  /// Where it was loaded from.
  std::string file() const {
    link_map* map = nullptr;
    return ::dlinfo(handle_, RTLD_DI_LINKMAP, &map) == 0 ? map->l_name : "";
  }
  bool has(const char* symbol) const { return ::dlsym(handle_, symbol) != nullptr; }

  /// Store a function's address. Throws kUnavailable if there is none of that name.
  template <class Function>
  void get(Function& function, const char* symbol) const {
    get_optional(function, symbol);
    if (function != nullptr) return;
    throw Error(ErrorKind::kUnavailable,
                what_ + " at " + file() + " has no " + symbol + ": it is too old, or another library");
  }
  /// nullptr if there is none.
  template <class Function>
  void get_optional(Function& function, const char* symbol) const {
    function = reinterpret_cast<Function>(::dlsym(handle_, symbol));
  }

 private:
  std::string what_;
  void* handle_ = nullptr;
};

}  // namespace pycomm
