// The collectives of HostCommunicator, with arguments as callers of the Communicator pass them; they are checked here,
// and nothing was sent when they are wrong.
#include <pybind11/stl.h>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using host::Communicator;
using host::Parts;
using MaybeWork = std::shared_ptr<host::Work>;  // none if the call was synchronous

/// Run `call(options)` without the GIL.
template <class Run>
MaybeWork without_gil(const Communicator& self, py::handle async_op, py::handle timeout_s, const Run& run) {
  const host::CallOptions options = options_of(self, async_op, timeout_s);
  const GilRelease nogil;
  return run(options);
}

/// A tensor that only the root has: none elsewhere.
std::optional<Tensor> only_at_root(const Communicator& self, py::handle tensor, int root, const char* name,
                                   Access access) {
  check_only_at_root(tensor, root, self.rank(), name);
  if (tensor.is_none()) return std::nullopt;
  return std::optional<Tensor>(std::in_place, tensor, name, access);
}

MaybeWork all_reduce(Communicator& self, py::handle argument, py::handle op, py::handle async_op,
                     py::handle timeout_s) {
  const Tensor tensor(argument, "the tensor", Access::kWrite);
  const ReduceOp reduce_op = reduce_op_of(op, tensor.dtype());
  return without_gil(self, async_op, timeout_s, [&](const auto& options) {
    return self.all_reduce(tensor.data(), tensor.count(), tensor.dtype(), reduce_op, options);
  });
}

MaybeWork broadcast(Communicator& self, py::handle argument, py::handle root_argument, py::handle async_op,
                    py::handle timeout_s) {
  const Tensor tensor(argument, "the tensor", Access::kWrite);
  const int root = rank_of(root_argument, self.world_size(), "root");
  return without_gil(self, async_op, timeout_s, [&](const auto& options) {
    return self.broadcast(tensor.data(), tensor.count(), tensor.dtype(), root, options);
  });
}

MaybeWork reduce(Communicator& self, py::handle argument, py::handle root_argument, py::handle op, py::handle async_op,
                 py::handle timeout_s) {
  const int root = rank_of(root_argument, self.world_size(), "root");
  const Tensor tensor(argument, "the tensor", self.rank() == root ? Access::kWrite : Access::kRead);
  const ReduceOp reduce_op = reduce_op_of(op, tensor.dtype());
  return without_gil(self, async_op, timeout_s, [&](const auto& options) {
    return self.reduce(tensor.data(), tensor.count(), tensor.dtype(), reduce_op, root, options);
  });
}

MaybeWork reduce_scatter(Communicator& self, py::handle output_argument, py::handle input_argument, py::handle op,
                         py::handle input_splits, py::handle async_op, py::handle timeout_s) {
  const Tensor output(output_argument, "output", Access::kWrite);
  const Tensor input(input_argument, "input", Access::kRead);
  Parts parts = parts_of(input, input_splits, self.world_size());
  check_part(input, output, parts, self.rank());
  const host::Tensors tensors{input.data(), output.data(), input.dtype()};
  const ReduceOp reduce_op = reduce_op_of(op, input.dtype());
  return without_gil(self, async_op, timeout_s, [&](const auto& options) {
    return self.reduce_scatter(tensors, std::move(parts), reduce_op, options);
  });
}

MaybeWork all_gather(Communicator& self, py::handle output_argument, py::handle input_argument,
                     py::handle output_splits, py::handle async_op, py::handle timeout_s) {
  const Tensor output(output_argument, "output", Access::kWrite);
  const Tensor input(input_argument, "input", Access::kRead);
  Parts parts = parts_of(output, output_splits, self.world_size());
  check_part(output, input, parts, self.rank());
  const host::Tensors tensors{input.data(), output.data(), input.dtype()};
  return without_gil(self, async_op, timeout_s,
                     [&](const auto& options) { return self.all_gather(tensors, std::move(parts), options); });
}

MaybeWork all_to_all(Communicator& self, py::handle output_argument, py::handle input_argument,
                     py::handle output_splits, py::handle input_splits, py::handle async_op, py::handle timeout_s) {
  const Tensor output(output_argument, "output", Access::kWrite);
  const Tensor input(input_argument, "input", Access::kRead);
  check_apart(output, input);
  Parts input_parts = parts_of(input, input_splits, self.world_size());
  const host::Tensors tensors{input.data(), output.data(), input.dtype()};
  if (output_splits.is_none() && input_splits.is_none()) {
    check_count(output, input.count());
    return without_gil(self, async_op, timeout_s,
                       [&](const auto& options) { return self.all_to_all(tensors, std::move(input_parts), options); });
  }
  Parts output_parts = parts_of(output, output_splits, self.world_size());
  return without_gil(self, async_op, timeout_s, [&](const auto& options) {
    return self.all_to_all_by_splits(tensors, std::move(output_parts), std::move(input_parts), options);
  });
}

MaybeWork gather(Communicator& self, py::handle output_argument, py::handle input_argument, py::handle root_argument,
                 py::handle async_op, py::handle timeout_s) {
  const Tensor input(input_argument, "input", Access::kRead);
  const int root = rank_of(root_argument, self.world_size(), "root");
  const std::optional<Tensor> output = only_at_root(self, output_argument, root, "output", Access::kWrite);
  const Parts parts = Parts::even(input.count(), self.world_size());
  if (output) {
    check_count(*output, parts.total());
    check_part(*output, input, parts, root);
  }
  const host::Tensors tensors{input.data(), output ? output->data() : nullptr, input.dtype()};
  return without_gil(self, async_op, timeout_s,
                     [&](const auto& options) { return self.gather(tensors, parts, root, options); });
}

MaybeWork scatter(Communicator& self, py::handle output_argument, py::handle input_argument, py::handle root_argument,
                  py::handle async_op, py::handle timeout_s) {
  const Tensor output(output_argument, "output", Access::kWrite);
  const int root = rank_of(root_argument, self.world_size(), "root");
  const std::optional<Tensor> input = only_at_root(self, input_argument, root, "input", Access::kRead);
  const Parts parts = Parts::even(output.count(), self.world_size());
  if (input) {
    check_count(*input, parts.total());
    check_part(*input, output, parts, root);
  }
  const host::Tensors tensors{input ? input->data() : nullptr, output.data(), output.dtype()};
  return without_gil(self, async_op, timeout_s,
                     [&](const auto& options) { return self.scatter(tensors, parts, root, options); });
}

MaybeWork barrier(Communicator& self, py::handle async_op, py::handle timeout_s) {
  return without_gil(self, async_op, timeout_s, [&](const auto& options) { return self.barrier(options); });
}

}  // namespace

void bind_collectives(CommunicatorClass& communicator) {
  communicator.def("all_reduce", &all_reduce)
      .def("broadcast", &broadcast)
      .def("reduce", &reduce)
      .def("reduce_scatter", &reduce_scatter)
      .def("all_gather", &all_gather)
      .def("all_to_all", &all_to_all)
      .def("gather", &gather)
      .def("scatter", &scatter)
      .def("barrier", &barrier);
}

}  // namespace pycomm::bindings
