// One bind_<header>.cpp per public header; module.cpp lists them. Nothing outside this folder knows pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>

#include "bindings/gil.hpp"
#include "host/communicator.hpp"

namespace pycomm::bindings {

/// Destroys what may wait for a peer or a device without the GIL, whether this thread holds it or not.
struct WithoutGil {
  template <class Object>
  void operator()(Object* object) const {
    if (PyGILState_Check() == 0) {
      delete object;
    } else {
      const GilRelease nogil;
      delete object;
    }
  }
};
using CommunicatorHolder = std::unique_ptr<host::Communicator, WithoutGil>;
using CommunicatorClass = pybind11::class_<host::Communicator, CommunicatorHolder>;

void bind_errors(pybind11::module_& module);
void bind_reduce(pybind11::module_& module);
void bind_gradient_step(pybind11::module_& module);
void bind_arguments(pybind11::module_& module);
void bind_communicator(pybind11::module_& module);
void bind_collectives(pybind11::module_& module);
void bind_work(pybind11::module_& module);
void bind_nccl(pybind11::module_& module);
void bind_rank_group(pybind11::module_& module);
void bind_overlapped_matmul(pybind11::module_& module);

/// Runs Python's signal handlers if this is the main thread; throws what they raise. Called without the GIL.
void check_signals();

}  // namespace pycomm::bindings
