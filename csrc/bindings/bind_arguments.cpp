// The checks of arguments, for back ends that are written in Python (pycomm/arguments.py).
#include <pybind11/stl.h>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

Tensor anywhere(py::handle argument, const char* name) { return {argument, name, Access::kRead, std::nullopt}; }

py::object checked_tensor(py::handle argument, const std::string& name, int cuda_index, bool written) {
  const dlpack::Device device{cuda_index < 0 ? dlpack::kCpu : dlpack::kCuda, std::max(cuda_index, 0)};
  const Tensor tensor(argument, name.c_str(), written ? Access::kWrite : Access::kRead, device);
  return py::reinterpret_borrow<py::object>(tensor.object());
}

std::vector<std::uint64_t> part_counts(py::handle whole, const std::string& name, py::handle splits, int world_size) {
  const host::Parts parts = parts_of(anywhere(whole, name.c_str()), splits, world_size);
  std::vector<std::uint64_t> counts;
  for (int p = 0; p < world_size; ++p) counts.push_back(parts.count(p));
  return counts;
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
  module.def("checked_op", [](py::handle tensor, py::handle op) {
    return std::string(name_of(reduce_op_of(op, anywhere(tensor, "the tensor").dtype())));
  });
  module.def("checked_rank", &rank_of);
  module.def("checked_source", &source_of);
  module.def("checked_tag", &tag_of);
  module.def("checked_flag", &flag_of);
  module.def("checked_timeout", &timeout_of, py::arg("seconds"), py::arg("or_zero") = false);
  module.def("part_counts", &part_counts);
  module.def("check_count", [](py::handle tensor, const std::string& name, std::uint64_t expected) {
    check_count(anywhere(tensor, name.c_str()), expected);
  });
  module.def("check_only_at_root", &check_only_at_root);
  module.def("check_apart", [](py::handle output, py::handle input) {
    check_apart(anywhere(output, "output"), anywhere(input, "input"));
  });
  module.def("check_part", [](py::handle output, py::handle input, bool output_is_part,
                              std::vector<std::uint64_t> counts, int owner) {
    const Tensor out = anywhere(output, "output");
    const Tensor in = anywhere(input, "input");
    check_part(output_is_part ? in : out, output_is_part ? out : in, host::Parts(std::move(counts)), owner);
  });
}

}  // namespace pycomm::bindings
