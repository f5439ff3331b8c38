// The GIL is released around everything that can wait.
#pragma once

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

namespace pycomm::bindings {

/// Releases the GIL for the life of this object.
///
/// Where the interpreter ends meanwhile, Python before 3.14 ends a thread that wants the GIL back by unwinding its
/// stack, and a destructor that is unwound ends the process. Here such a thread stays where it is, as it does from 3.14
/// on; the process ends without it.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      while (true) ::pause();
    }
  }
  GilRelease(const GilRelease&) = delete;  // marks one scope
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

/// For bindings that do nothing with Python's objects.
using NoGil = pybind11::call_guard<GilRelease>;

}  // namespace pycomm::bindings
