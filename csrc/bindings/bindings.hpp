// One bind_<header>.cpp per public header; module.cpp lists them. Nothing outside this folder knows pybind11.
#pragma once

#include <pybind11/pybind11.h>

namespace pycomm::bindings {

void bind_errors(pybind11::module_& module);
void bind_reduce(pybind11::module_& module);
void bind_communicator(pybind11::module_& module);

/// Runs Python's signal handlers if this is the main thread; throws what they raise. Called without the GIL.
void check_signals();

}  // namespace pycomm::bindings
