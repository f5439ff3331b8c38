#include "nccl/shared_library.hpp"

#include <dlfcn.h>
#include <link.h>

#include "pycomm/error.hpp"

namespace pycomm::nccl {

namespace {

constexpr std::string_view kLoaded = "loaded:";

void* open(const std::string& name) {
  const bool only_loaded = name.starts_with(kLoaded);
  const std::string file = only_loaded ? name.substr(kLoaded.size()) : name;
  return dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | (only_loaded ? RTLD_NOLOAD : 0));
}

std::string file_of(void* handle) {
  link_map* map = nullptr;
  return dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 ? map->l_name : "";
}

}  // namespace

SharedLibrary::SharedLibrary(const std::string& what, const std::vector<std::string>& names) : what_(what) {
  std::string reasons;
  for (const std::string& name : names) {
    handle_ = open(name);
    if (handle_ != nullptr) {
      file_ = file_of(handle_);
      return;
    }
    const char* const reason = dlerror();  // none if it merely is not loaded yet
    if (!name.starts_with(kLoaded) && reason != nullptr) reasons += (reasons.empty() ? "" : "; ") + std::string(reason);
  }
  throw Error(ErrorKind::kUnavailable, what_ + " cannot be loaded: " + reasons);
}

void* SharedLibrary::find(const char* symbol) const { return dlsym(handle_, symbol); }

void SharedLibrary::refuse(const char* symbol) const {
  throw Error(ErrorKind::kUnavailable,
              what_ + " at " + file_ + " has no " + symbol + ": it is too old, or another library");
}

}  // namespace pycomm::nccl
