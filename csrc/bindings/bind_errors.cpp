#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "pycomm/error.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

const char* class_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kTimeout:
      return "PeerTimeoutError";
    case ErrorKind::kPeerLost:
      return "PeerLostError";
    case ErrorKind::kStrictOrder:
    case ErrorKind::kDeadlock:
      return "StrictOrderError";
    case ErrorKind::kMismatch:
      return "MismatchError";
    case ErrorKind::kUnavailable:
      return "BackendUnavailableError";
    default:
      return "PycommError";
  }
}

void raise(const Error& error) {
  if (error.kind == ErrorKind::kWaitExpired) return PyErr_SetString(PyExc_TimeoutError, error.what());
  if (error.kind == ErrorKind::kOutOfMemory) return PyErr_SetString(PyExc_MemoryError, error.what());
  const py::object type = py::module_::import("pycomm.errors").attr(class_of(error.kind));
  py::dict fields;
  if (error.kind == ErrorKind::kTimeout) {
    fields["op"] = error.op;
    fields["seq"] = error.seq;
    fields["group"] = error.group;
    fields["missing_ranks"] = error.ranks;
  } else if (error.kind == ErrorKind::kPeerLost) {
    fields["lost_ranks"] = error.ranks;
  } else if (error.kind == ErrorKind::kMismatch) {
    py::dict calls;
    for (std::size_t rank = 0; rank < error.calls.size(); ++rank) calls[py::int_(rank)] = error.calls[rank];
    fields["calls"] = calls;
  }
  PyErr_SetObject(type.ptr(), type(error.what(), **fields).ptr());
}

}  // namespace

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void bind_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      raise(error);
    }
  });
}

}  // namespace pycomm::bindings
