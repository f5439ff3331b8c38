#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "host/completions.hpp"
#include "host/progress.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

void bind_completions(py::module_& module) {
  using host::Completions;
  py::class_<Completions, std::shared_ptr<Completions>>(module, "Completions")
      .def(py::init<>())
      .def("watch", [](const std::shared_ptr<Completions>& self, host::Work& work,
                       std::uint64_t token) { work.announce(self, token); })
      .def("take", &Completions::take, py::arg("timeout_s") = py::none(), NoGil())
      .def("close", &Completions::close);
}

}  // namespace pycomm::bindings
