#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/work.hpp"
#include "pycomm/inside.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

/// An error of code in Python, which ended an operation.
struct PythonError {
  std::shared_ptr<void> error;
};

py::handle object_of(const std::shared_ptr<void>& object) { return static_cast<PyObject*>(object.get()); }

/// A communicator of a back end in Python: what its threads wait for (inside.hpp) has its address. `look` and `rest`:
/// Python's, or None; called now and then while a caller waits for one of its operations, and afterwards.
struct Waits {
  int rank;
  std::string group;
  std::shared_ptr<void> look;
  std::shared_ptr<void> rest;

  std::string of_group(const std::string& call) const { return call + " of group '" + group + "'"; }
};

/// An operation that code in Python ends.
class Posted final : public Work {
 public:
  Posted(std::shared_ptr<Waits> waits, const std::string& call, bool is_collective)
      : Work(waits.get(), waits->of_group(call), is_collective), waits_(std::move(waits)) {}

 protected:
  const void* ended_by() const override { return nullptr; }  // of any: of groups of its host, and of others
  void look() override {
    constexpr auto kPeriod = std::chrono::milliseconds(250);
    const auto now = Deadline::Clock::now();
    if (now - looked_at_ < kPeriod) return;
    looked_at_ = now;
    call(waits_->look);
  }
  void rest() override { call(waits_->rest); }

 private:
  static void call(const std::shared_ptr<void>& function) {
    const py::gil_scoped_acquire gil;
    if (const py::handle callable = object_of(function); !callable.is_none()) callable();
  }

  std::shared_ptr<Waits> waits_;
  Deadline::Clock::time_point looked_at_ = Deadline::Clock::now();
};

/// A Work that is over when its parts are, and whose wait is Python's: `wait(timeout_s)`.
class Relayed final : public Work {
 public:
  Relayed(const std::shared_ptr<Waits>& waits, const std::string& call, std::vector<std::shared_ptr<Work>> parts,
          py::function wait, std::vector<int> ranks)
      : Work(waits.get(), waits->of_group(call)),
        waits_(waits),
        parts_(std::move(parts)),
        wait_(kept(wait)),
        ranks_(std::move(ranks)) {}

  bool done() const override {
    return std::all_of(parts_.begin(), parts_.end(), [](const auto& part) { return part->done(); });
  }
  int source() const override {
    const int source = parts_.empty() ? -1 : parts_.front()->source();
    return source < 0 || ranks_.empty() ? source : ranks_.at(static_cast<std::size_t>(source));
  }
  void wait(std::optional<double> timeout_s, InterruptCheck) override {
    const py::gil_scoped_acquire gil;
    const Inside inside(owner(), Inside::Kind::kOther, &describe, this);
    object_of(wait_)(timeout_s);
  }

 private:
  std::shared_ptr<Waits> waits_;
  std::vector<std::shared_ptr<Work>> parts_;
  std::shared_ptr<void> wait_;
  std::vector<int> ranks_;
};

std::shared_ptr<Work> relayed(const std::shared_ptr<Waits>& waits, const std::string& call,
                              std::vector<std::shared_ptr<Work>> parts, py::function wait, std::vector<int> ranks) {
  auto work = std::make_shared<Relayed>(waits, call, parts, std::move(wait), std::move(ranks));
  Work::finish_after(work, parts);
  return work;
}

}  // namespace

std::shared_ptr<void> kept(py::object object) {
  return {object.release().ptr(), [](void* held) {
            auto* const reference = static_cast<PyObject*>(held);
            if (PyGILState_Check() != 0) return Py_DECREF(reference);
            // Threads of this library never take the GIL: the interpreter does it, when it comes to that.
            static_cast<void>(Py_AddPendingCall(
                [](void* late) {
                  Py_DECREF(static_cast<PyObject*>(late));
                  return 0;
                },
                reference));
          }};
}

void wait_for(Work& work, std::optional<double> timeout_s) {
  {
    const GilRelease nogil;
    work.wait(timeout_s, &check_signals);
  }
  if (work.done()) work.release();  // else a stream waits for it, not this thread
}

void bind_work(py::module_& module) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const PythonError& ended) {
      const py::object error = object_of(ended.error).attr("with_traceback")(py::none());
      py::module_::import("pycomm.backends.causes").attr("raised")(error);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    }
  });

  py::class_<Completions, std::shared_ptr<Completions>>(module, "Completions")
      .def(py::init<>())
      .def("take", &Completions::take, py::arg("timeout_s") = py::none(), NoGil())
      .def("close", &Completions::close);

  py::class_<Waits, std::shared_ptr<Waits>>(module, "Waits")
      .def(
          py::init([](int rank, std::string group, py::object look, py::object rest) {
            return std::make_shared<Waits>(Waits{rank, std::move(group), kept(std::move(look)), kept(std::move(rest))});
          }),
          py::arg("rank"), py::arg("group"), py::arg("look") = py::none(), py::arg("rest") = py::none())
      .def("check_outside", [](const Waits& self) { Inside::check_outside(&self, self.rank); })
      .def("of_this_thread", [](const Waits& self) {
        const Inside* const inside = Inside::find(&self);
        return inside == nullptr ? std::optional<std::string>() : inside->what();
      });

  py::class_<Work, std::shared_ptr<Work>>(module, "Work", R"(An operation that is under way.

It keeps its tensors alive until it is over, even if the Work itself is dropped.)")
      .def(py::init([](std::shared_ptr<Waits> waits, const std::string& call, bool is_collective) {
             return std::shared_ptr<Work>(std::make_shared<Posted>(std::move(waits), call, is_collective));
           }),
           py::arg("waits"), py::arg("call"), py::arg("is_collective") = false)
      .def_static("relayed", &relayed, py::arg("waits"), py::arg("call"), py::arg("parts"), py::arg("wait"),
                  py::arg("ranks") = std::vector<int>())
      .def(
          "wait",
          [](Work& self, py::handle timeout_s) {
            wait_for(self, timeout_s.is_none() ? std::nullopt : std::optional(timeout_of(timeout_s, true)));
          },
          py::arg("timeout_s") = py::none(), R"(Return when the operation is over; raise what went wrong in it.

Args:
    timeout_s: seconds to wait here, 0 to look once; None: as long as the operation's own timeout lets it run. With
        timeout_s the host waits for a GPU, too; else the current stream does.

Raises:
    TimeoutError: not over after timeout_s; the operation goes on.
    PycommError: the operation failed.)")
      .def("is_awaited", &Work::is_awaited, "Return whether a thread waits for it, or is to be told of its end.")
      .def("done", &Work::done, "Return True once the operation is over, well or not.")
      .def_property_readonly("source", &Work::source, "After the end of a recv: the rank that sent.")
      .def(
          "announce",
          [](Work& self, std::shared_ptr<Completions> completions, std::uint64_t token) {
            self.announce(std::move(completions), token);
          },
          "Put token into completions when the operation is over, at once if it is.")
      .def(
          "finish", [](Work& self, int source) { self.finish(nullptr, source); }, py::arg("source") = -1)
      .def("fail", [](Work& self, py::object error) {
        self.finish(std::make_exception_ptr(PythonError{kept(std::move(error))}));
      });
}

}  // namespace pycomm::bindings
