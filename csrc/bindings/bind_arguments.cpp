// What code in Python checks of arguments that are no call's (pycomm/arguments.py).
#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

py::object checked_tensor(py::handle argument, const std::string& name, int cuda_index) {
  const dlpack::Device device{cuda_index < 0 ? dlpack::kCpu : dlpack::kCuda, std::max(cuda_index, 0)};
  const Tensor tensor(argument, name.c_str(), Access::kRead, device);
  return py::reinterpret_borrow<py::object>(tensor.object());
}

py::tuple dtype_names() {
  py::tuple names(kNumDTypes);
  for (int d = 0; d < kNumDTypes; ++d) names[static_cast<std::size_t>(d)] = name_of(static_cast<DType>(d));
  return names;
}

}  // namespace

void bind_arguments(py::module_& module) {
  module.attr("DTYPES") = dtype_names();
  module.attr("NUM_NUMBER_TYPES") = kNumNumberTypes;
  module.attr("LONGEST_TIMEOUT_S") = kLongestTimeout;
  module.def("checked_tensor", &checked_tensor);
  module.def("checked_timeout", [](py::handle seconds) { return timeout_of(seconds); });
}

}  // namespace pycomm::bindings
