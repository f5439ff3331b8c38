// The reductions as Python functions, for tests and measurements: they take addresses, and whoever calls them answers
// for the memory behind those.
#include <pybind11/stl.h>

#include "bindings/addresses.hpp"
#include "bindings/bindings.hpp"
#include "host/reduce.hpp"

namespace py = pybind11;

namespace pycomm::bindings {
namespace {

void reduce_addresses(const std::string& dtype_name, const std::string& op_name,
                      const std::vector<std::uintptr_t>& sources, const std::vector<std::uintptr_t>& destinations,
                      std::size_t count) {
  const DType dtype = parse_dtype(dtype_name);
  const ReduceOp op = parse_op(op_name);
  const host::ReduceKernel kernel = host::reduce_kernel(dtype, op);
  const auto src = pointers<const void*>(sources, count, "sources");
  const auto dst = pointers<void*>(destinations, count, "destinations");
  const GilRelease nogil;
  kernel(src.data(), static_cast<int>(src.size()), dst.data(), static_cast<int>(dst.size()), count);
}

}  // namespace

void bind_reduce(py::module_& module) {
  module.def("reduce", &reduce_addresses, py::arg("dtype"), py::arg("op"), py::arg("sources"), py::arg("destinations"),
             py::arg("count"),
             "Reduce `count` elements of `dtype` over the buffers at the addresses `sources`, in order, into each of\n"
             "`destinations`. A destination is a source or overlaps none. Addresses need no alignment.\n\n"
             "Raises ValueError: an unknown dtype or op, \"avg\" of integers, an empty list, a null pointer.");
  module.def(
      "simd_level", [] { return host::name_of(host::simd_level()); },
      "The SIMD level that reductions use now: \"baseline\", \"avx2\" or \"avx512\".");
  module.def(
      "best_simd_level", [] { return host::name_of(host::best_simd_level()); },
      "The best SIMD level of this processor, which reductions use unless told otherwise.");
  module.def(
      "set_simd_level", [](const std::string& name) { host::set_simd_level(host::parse_simd_level(name)); },
      py::arg("name"),
      "Use this SIMD level in the whole process. Raises ValueError: unknown, or not in this processor.");
}

}  // namespace pycomm::bindings
