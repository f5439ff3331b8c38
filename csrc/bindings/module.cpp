#include "bindings/bindings.hpp"

PYBIND11_MODULE(_C, module) {
  module.doc() = "pycomm's compiled core; use it through the pycomm package.";
  module.def("version", [] { return PYCOMM_VERSION; });
  pycomm::bindings::bind_errors(module);
  pycomm::bindings::bind_reduce(module);
  pycomm::bindings::bind_arguments(module);
  pycomm::bindings::bind_communicator(module);
}
