// The collectives of HostCommunicator. Tensors cross as addresses, parts as lists of numbers of elements, one a rank.
#include <pybind11/stl.h>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using host::Communicator;
using host::Parts;
using NoGil = py::call_guard<py::gil_scoped_release>;
using Address = std::uintptr_t;
using Counts = std::vector<std::uint64_t>;

void* as_pointer(Address address) { return reinterpret_cast<void*>(address); }

host::Tensors tensors_of(Address output, Address input, int dtype) {
  return {as_pointer(input), as_pointer(output), static_cast<DType>(dtype)};
}

void bind_in_place(CommunicatorClass& communicator) {
  communicator
      .def(
          "all_reduce",
          [](Communicator& self, Address data, std::size_t count, int dtype, int op, bool async_op, double timeout_s) {
            return self.all_reduce(as_pointer(data), count, static_cast<DType>(dtype), static_cast<ReduceOp>(op),
                                   {timeout_s, async_op});
          },
          NoGil())
      .def(
          "broadcast",
          [](Communicator& self, Address data, std::size_t count, int dtype, int root, bool async_op,
             double timeout_s) {
            return self.broadcast(as_pointer(data), count, static_cast<DType>(dtype), root, {timeout_s, async_op});
          },
          NoGil())
      .def(
          "reduce",
          [](Communicator& self, Address data, std::size_t count, int dtype, int op, int root, bool async_op,
             double timeout_s) {
            return self.reduce(as_pointer(data), count, static_cast<DType>(dtype), static_cast<ReduceOp>(op), root,
                               {timeout_s, async_op});
          },
          NoGil())
      .def(
          "barrier",
          [](Communicator& self, bool async_op, double timeout_s) { return self.barrier({timeout_s, async_op}); },
          NoGil());
}

void bind_from_input_to_output(CommunicatorClass& communicator) {
  communicator
      .def(
          "reduce_scatter",
          [](Communicator& self, Address output, Address input, int dtype, Counts counts, int op, bool async_op,
             double timeout_s) {
            return self.reduce_scatter(tensors_of(output, input, dtype), Parts(std::move(counts)),
                                       static_cast<ReduceOp>(op), {timeout_s, async_op});
          },
          NoGil())
      .def(
          "all_gather",
          [](Communicator& self, Address output, Address input, int dtype, Counts counts, bool async_op,
             double timeout_s) {
            return self.all_gather(tensors_of(output, input, dtype), Parts(std::move(counts)), {timeout_s, async_op});
          },
          NoGil())
      .def(
          "all_to_all",
          [](Communicator& self, Address output, Address input, int dtype, Counts counts, bool async_op,
             double timeout_s) {
            return self.all_to_all(tensors_of(output, input, dtype), Parts(std::move(counts)), {timeout_s, async_op});
          },
          NoGil())
      .def(
          "all_to_all_by_splits",
          [](Communicator& self, Address output, Address input, int dtype, Counts output_counts, Counts input_counts,
             bool async_op, double timeout_s) {
            return self.all_to_all_by_splits(tensors_of(output, input, dtype), Parts(std::move(output_counts)),
                                             Parts(std::move(input_counts)), {timeout_s, async_op});
          },
          NoGil())
      .def(
          "gather",
          [](Communicator& self, Address output, Address input, int dtype, Counts counts, int root, bool async_op,
             double timeout_s) {
            return self.gather(tensors_of(output, input, dtype), Parts(std::move(counts)), root, {timeout_s, async_op});
          },
          NoGil())
      .def(
          "scatter",
          [](Communicator& self, Address output, Address input, int dtype, Counts counts, int root, bool async_op,
             double timeout_s) {
            return self.scatter(tensors_of(output, input, dtype), Parts(std::move(counts)), root,
                                {timeout_s, async_op});
          },
          NoGil());
}

}  // namespace

void bind_collectives(CommunicatorClass& communicator) {
  bind_in_place(communicator);
  bind_from_input_to_output(communicator);
}

}  // namespace pycomm::bindings
