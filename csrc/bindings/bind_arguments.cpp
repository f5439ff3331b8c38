// The checks of arguments, for back ends that are written in Python (pycomm/arguments.py).
#include <pybind11/stl.h>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

py::object checked_tensor(py::handle argument, const std::string& name, int cuda_index, bool reduced) {
  const dlpack::Device device{cuda_index < 0 ? dlpack::kCpu : dlpack::kCuda, std::max(cuda_index, 0)};
  const Tensor tensor(argument, name.c_str(), device);
  static_cast<void>(reduced ? tensor.reduced_dtype() : tensor.moved_dtype());
  return py::reinterpret_borrow<py::object>(tensor.object());
}

std::vector<std::uint64_t> part_counts(py::handle whole, const std::string& name, py::handle splits, int world_size) {
  const host::Parts parts = parts_of(Tensor(whole, name.c_str(), std::nullopt), splits, world_size);
  std::vector<std::uint64_t> counts;
  for (int p = 0; p < world_size; ++p) counts.push_back(parts.count(p));
  return counts;
}

}  // namespace

void bind_arguments(py::module_& module) {
  module.def("checked_tensor", &checked_tensor);
  module.def("checked_op", [](std::string_view op) { return std::string(name_of(reduce_op_of(op))); });
  module.def("part_counts", &part_counts);
  module.def("check_count", [](py::handle tensor, const std::string& name, std::uint64_t expected) {
    check_count(Tensor(tensor, name.c_str(), std::nullopt), expected);
  });
  module.def("check_rank", &check_rank);
  module.def("check_only_at_root", &check_only_at_root);
  module.def("check_apart", [](py::handle output, py::handle input) {
    check_apart(Tensor(output, "output", std::nullopt), Tensor(input, "input", std::nullopt));
  });
  module.def("check_part", [](py::handle output, py::handle input, bool output_is_part,
                              std::vector<std::uint64_t> counts, int owner) {
    const Tensor out(output, "output", std::nullopt);
    const Tensor in(input, "input", std::nullopt);
    check_part(output_is_part ? in : out, output_is_part ? out : in, host::Parts(std::move(counts)), owner);
  });
}

}  // namespace pycomm::bindings
