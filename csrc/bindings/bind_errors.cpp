#include <pybind11/stl.h>
#include <unistd.h>

#include "bindings/bindings.hpp"
#include "host/groups.hpp"
#include "host/waiter.hpp"
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

struct ActivityScope {
  explicit ActivityScope(std::string text) : what(std::move(text)) {}
  std::string what;
  std::optional<host::Activity> shown;
};

/// Of a caller: for ranks, with what other hosts have said of the roots; or for operations of any communicator.
struct WaitFromPython {
  explicit WaitFromPython(bool for_work)
      : shown(for_work ? ShownWait::Kind::kForWork : ShownWait::Kind::kForRanks, nullptr) {}
  ShownWait shown;
};

/// Some of it may come from a peer's memory: whatever is not UTF-8 is replaced.
py::object text_of(const std::string& text) {
  PyObject* const decoded = PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "replace");
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(decoded);
}

void raise(const Error& error) {
  const py::object text = text_of(error.what());
  if (error.kind == ErrorKind::kWaitExpired) return PyErr_SetObject(PyExc_TimeoutError, text.ptr());
  if (error.kind == ErrorKind::kOutOfMemory) return PyErr_SetObject(PyExc_MemoryError, text.ptr());
  const py::object type = py::module_::import("pycomm.errors").attr(class_of(error.kind));
  py::dict fields;
  if (error.kind == ErrorKind::kTimeout) {
    fields["op"] = error.op;
    fields["seq"] = error.seq;
    fields["group"] = error.group;
    fields["missing_ranks"] = error.ranks;
  } else if (error.kind == ErrorKind::kPeerLost) {
    fields["lost_ranks"] = error.ranks;
    fields["group"] = error.group;
  } else if (error.kind == ErrorKind::kMismatch) {
    py::dict calls;
    for (std::size_t rank = 0; rank < error.calls.size(); ++rank) calls[py::int_(rank)] = error.calls[rank];
    fields["calls"] = calls;
  }
  const py::object raised = type(text, **fields);
  if (!error.root.processes.empty()) {
    raised.attr("_root") = py::make_tuple(error.root.processes, text_of(error.root.text));
    host::tell_of(error.root);  // now it is known to the caller, whatever was called since it happened
    py::module_::import("pycomm.backends.causes").attr("pass_on")(error.root.processes, text_of(error.root.text));
  }
  PyErr_SetObject(type.ptr(), raised.ptr());
}

}  // namespace

void check_signals() {
  if (::gettid() != ::getpid()) return;  // not the main thread, which alone runs handlers
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void bind_errors(py::module_& module) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      raise(error);
    }
  });
  module.def("tell_of", [](std::vector<std::uint64_t> processes, std::string text) {
    host::tell_of({std::move(processes), std::move(text)});
  });
  module.def("num_heard", &host::num_heard);
  module.def("last_heard", [] {
    const Root root = host::last_heard();
    return py::make_tuple(root.processes, text_of(root.text));
  });
  module.def("expect_ranks", &host::expect_ranks);
  module.attr("AT_ROOT") = host::kAtRoot;
  module.def("serve_callers", &host::serve_callers);
  module.def("shown_waits", [] {
    const host::Waits waits = host::shown_waits();
    std::vector<std::pair<std::uint64_t, std::uint64_t>> roots;
    for (std::uint32_t i = 0; i < waits.num_roots; ++i) roots.emplace_back(waits.roots[i].token, waits.roots[i].hops);
    return py::make_tuple(waits.is_waiting != 0, roots, text_of(host::text_in(waits.text)));
  });
  py::class_<WaitFromPython>(module, "ShownWait")
      .def(py::init<bool>(), py::arg("for_work") = false)
      .def("show", [](WaitFromPython& self, const std::vector<std::pair<std::uint64_t, std::uint64_t>>& processes,
                      const std::string& text) {
        Roots roots;
        for (const auto& [token, hops] : processes) roots.add({token, hops}, text);
        self.shown.show(std::move(roots));
      });
  py::class_<ActivityScope>(module, "Activity")
      .def(py::init<std::string>(), py::arg("what"))
      .def("__enter__", [](ActivityScope& self) { self.shown.emplace(self.what); })
      .def("__exit__", [](ActivityScope& self, const py::args&) { self.shown.reset(); });
}

}  // namespace pycomm::bindings
