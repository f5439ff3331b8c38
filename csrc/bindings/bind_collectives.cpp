// The collectives of a communicator, with arguments as callers of the Communicator pass them. They are checked here,
// for every back end, and nothing was sent when they are wrong.
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/calls.hpp"
#include "bindings/names.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

/// A tensor that only the root has: none elsewhere.
std::optional<Tensor> only_at_root(const Calls& self, py::handle tensor, int root, const char* name, bool is_written) {
  check_only_at_root(tensor, root, self.rank(), name);
  if (tensor.is_none()) return std::nullopt;
  return is_written ? self.written(tensor, name) : self.read(tensor, name);
}

py::handle object_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->object() : py::none(); }
void* data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->data() : nullptr; }

/// Of a call that works in place.
MaybeWork in_place(Calls& self, const Call& call, const Tensor& tensor, const CallOptions& options) {
  return self.submit({call, {tensor.data(), tensor.data(), {}, {}}}, tensor.object(), tensor.object(), options);
}

MaybeWork all_reduce(Calls& self, py::handle argument, py::handle op, py::handle async_op, py::handle timeout_s) {
  const Tensor tensor = self.written(argument, "the tensor");
  const Call call{.kind = OpKind::kAllReduce,
                  .dtype = tensor.dtype(),
                  .reduce_op = reduce_op_of(op, tensor.dtype()),
                  .count = tensor.count()};
  return in_place(self, call, tensor, self.options(async_op, timeout_s));
}

MaybeWork scan(Calls& self, py::handle argument, py::handle op, py::handle async_op, py::handle timeout_s) {
  const Tensor tensor = self.written(argument, "the tensor");
  const ReduceOp reduce_op = reduce_op_of(op, tensor.dtype());
  if (reduce_op == ReduceOp::kAvg) {
    throw py::value_error("scan: op avg is not supported; scan the sum, and divide by the rank's number plus one");
  }
  const Call call{.kind = OpKind::kScan, .dtype = tensor.dtype(), .reduce_op = reduce_op, .count = tensor.count()};
  return in_place(self, call, tensor, self.options(async_op, timeout_s));
}

MaybeWork broadcast(Calls& self, py::handle argument, py::handle root, py::handle async_op, py::handle timeout_s) {
  const Tensor tensor = self.written(argument, "the tensor");
  const Call call{.kind = OpKind::kBroadcast,
                  .dtype = tensor.dtype(),
                  .root = rank_of(root, self.world_size(), "root"),
                  .count = tensor.count()};
  return in_place(self, call, tensor, self.options(async_op, timeout_s));
}

MaybeWork reduce(Calls& self, py::handle argument, py::handle root_argument, py::handle op, py::handle async_op,
                 py::handle timeout_s) {
  const int root = rank_of(root_argument, self.world_size(), "root");
  const Tensor tensor = self.rank() == root ? self.written(argument, "the tensor") : self.read(argument, "the tensor");
  const Call call{.kind = OpKind::kReduce,
                  .dtype = tensor.dtype(),
                  .reduce_op = reduce_op_of(op, tensor.dtype()),
                  .root = root,
                  .count = tensor.count()};
  return in_place(self, call, tensor, self.options(async_op, timeout_s));
}

MaybeWork reduce_scatter(Calls& self, py::handle output_argument, py::handle input_argument, py::handle op,
                         py::handle input_splits, py::handle async_op, py::handle timeout_s) {
  const Tensor output = self.written(output_argument, "output");
  const Tensor input = self.read(input_argument, "input");
  Parts parts = parts_of(input, input_splits, self.world_size());
  check_part(input, output, parts, self.rank());
  const Call call{.kind = OpKind::kReduceScatter,
                  .dtype = input.dtype(),
                  .reduce_op = reduce_op_of(op, input.dtype()),
                  .count = parts.total(),
                  .splits = parts.hash()};
  return self.submit({call, {input.data(), output.data(), std::move(parts), {}}}, output.object(), input.object(),
                     self.options(async_op, timeout_s));
}

MaybeWork all_gather(Calls& self, py::handle output_argument, py::handle input_argument, py::handle output_splits,
                     py::handle async_op, py::handle timeout_s) {
  const Tensor output = self.written(output_argument, "output");
  const Tensor input = self.read(input_argument, "input");
  Parts parts = parts_of(output, output_splits, self.world_size());
  check_part(output, input, parts, self.rank());
  const Call call{.kind = OpKind::kAllGather, .dtype = input.dtype(), .count = parts.total(), .splits = parts.hash()};
  return self.submit({call, {input.data(), output.data(), {}, std::move(parts)}}, output.object(), input.object(),
                     self.options(async_op, timeout_s));
}

MaybeWork all_to_all(Calls& self, py::handle output_argument, py::handle input_argument, py::handle output_splits,
                     py::handle input_splits, py::handle async_op, py::handle timeout_s) {
  const Tensor output = self.written(output_argument, "output");
  const Tensor input = self.read(input_argument, "input");
  check_apart(output, input);
  Parts from = parts_of(input, input_splits, self.world_size());
  const bool by_splits = !output_splits.is_none() || !input_splits.is_none();
  if (!by_splits) check_count(output, input.count());
  Parts to = by_splits ? parts_of(output, output_splits, self.world_size()) : from;
  const Call call{.kind = OpKind::kAllToAll,
                  .dtype = input.dtype(),
                  .count = by_splits ? 0 : from.total(),
                  .splits = by_splits ? 1U : 0U};
  return self.submit({call, {input.data(), output.data(), std::move(from), std::move(to)}}, output.object(),
                     input.object(), self.options(async_op, timeout_s));
}

MaybeWork gather(Calls& self, py::handle output_argument, py::handle input_argument, py::handle root_argument,
                 py::handle async_op, py::handle timeout_s) {
  const Tensor input = self.read(input_argument, "input");
  const int root = rank_of(root_argument, self.world_size(), "root");
  const std::optional<Tensor> output = only_at_root(self, output_argument, root, "output", true);
  Parts parts = Parts::even(input.count(), self.world_size());
  if (output) {
    check_count(*output, parts.total());
    check_part(*output, input, parts, root);
  }
  const Call call{.kind = OpKind::kGather, .dtype = input.dtype(), .root = root, .count = parts.total()};
  return self.submit({call, {input.data(), data_of(output), {}, std::move(parts)}}, object_of(output), input.object(),
                     self.options(async_op, timeout_s));
}

MaybeWork scatter(Calls& self, py::handle output_argument, py::handle input_argument, py::handle root_argument,
                  py::handle async_op, py::handle timeout_s) {
  const Tensor output = self.written(output_argument, "output");
  const int root = rank_of(root_argument, self.world_size(), "root");
  const std::optional<Tensor> input = only_at_root(self, input_argument, root, "input", false);
  Parts parts = Parts::even(output.count(), self.world_size());
  if (input) {
    check_count(*input, parts.total());
    check_part(*input, output, parts, root);
  }
  const Call call{.kind = OpKind::kScatter, .dtype = output.dtype(), .root = root, .count = parts.total()};
  return self.submit({call, {data_of(input), output.data(), std::move(parts), {}}}, output.object(), object_of(input),
                     self.options(async_op, timeout_s));
}

MaybeWork barrier(Calls& self, py::handle async_op, py::handle timeout_s) {
  return self.submit({Call{.kind = OpKind::kBarrier}, {}}, py::none(), py::none(), self.options(async_op, timeout_s));
}

std::vector<std::uint64_t> counts_of(const Parts& parts) {
  std::vector<std::uint64_t> counts;
  for (int p = 0; p < parts.num_parts(); ++p) counts.push_back(parts.count(p));
  return counts;
}

std::uintptr_t address(const void* data) { return reinterpret_cast<std::uintptr_t>(data); }

CheckedCall unpack(const std::string& packed) {
  CheckedCall checked;
  if (packed.size() != sizeof(Call)) {
    throw py::value_error("a call has " + std::to_string(sizeof(Call)) + " bytes, not " +
                          std::to_string(packed.size()));
  }
  std::memcpy(&checked.call, packed.data(), sizeof(Call));
  return checked;
}

/// Of calls that came from another process, names are asked for only if there are some.
const Call& known(const CheckedCall& checked) {
  if (is_known(checked.call)) return checked.call;
  throw py::value_error(describe(checked.call));
}

void bind_call(py::module_& module) {
  py::class_<CheckedCall>(module, "Call")
      .def(py::init([](std::string_view kind, std::string_view dtype, std::int32_t root, std::uint64_t count,
                       std::int64_t splits) {
             return CheckedCall{{.kind = parse<OpKind>(kind, kNumOpKinds, "call"),
                                 .dtype = parse<DType>(dtype, kNumDTypes, "dtype"),
                                 .root = root,
                                 .count = count,
                                 .splits = static_cast<std::uint64_t>(splits)},
                                {}};
           }),
           py::arg("kind"), py::kw_only(), py::arg("dtype") = "uint8", py::arg("root") = 0, py::arg("count") = 0,
           py::arg("splits") = 0)
      .def_static("unpack", &unpack)
      .def("pack",
           [](const CheckedCall& self) { return py::bytes(reinterpret_cast<const char*>(&self.call), sizeof(Call)); })
      .def("__str__", [](const CheckedCall& self) { return describe(self.call); })
      .def_property_readonly("kind", [](const CheckedCall& self) { return name_of(known(self).kind); })
      .def_property_readonly("dtype", [](const CheckedCall& self) { return name_of(known(self).dtype); })
      .def_property_readonly("op", [](const CheckedCall& self) { return name_of(known(self).reduce_op); })
      .def_property_readonly("root", [](const CheckedCall& self) { return self.call.root; })
      .def_property_readonly("count", [](const CheckedCall& self) { return self.call.count; })
      .def_property_readonly("by_splits", [](const CheckedCall& self) { return self.call.splits != 0; })
      .def_property_readonly("tag", [](const CheckedCall& self) { return static_cast<std::int64_t>(self.call.splits); })
      .def_property_readonly("output", [](const CheckedCall& self) { return address(self.operands.output); })
      .def_property_readonly("output_counts",
                             [](const CheckedCall& self) { return counts_of(self.operands.output_parts); })
      .def_property_readonly("input_counts",
                             [](const CheckedCall& self) { return counts_of(self.operands.input_parts); })
      .def("at",
           [](CheckedCall self, std::uintptr_t output, std::uintptr_t input) {
             self.operands.output = reinterpret_cast<void*>(output);
             self.operands.input = reinterpret_cast<const void*>(input);
             return self;
           })
      .def("by_kernel", [](CheckedCall self, std::string_view kernel, std::uint64_t memory, std::uint64_t offset) {
        self.call.route = parse<Route>(kernel, kNumRoutes, "kernel");
        self.call.splits = Location(memory, offset).bits();
        return self;
      });
}

}  // namespace

Calls::Calls(host::Communicator& host)
    : host_(&host), rank_(host.rank()), world_size_(host.world_size()), timeout_s_(host.timeout_s()) {}

Calls::Calls(py::object backend, double timeout_s)
    : python_(std::move(backend)),
      rank_(python_.attr("rank").cast<int>()),
      world_size_(python_.attr("world_size").cast<int>()),
      timeout_s_(timeout_s) {
  const py::object device = python_.attr("device");
  if (device.attr("type").cast<std::string_view>() != "cpu")
    device_ = {dlpack::kCuda, device.attr("index").cast<int>()};
}

CallOptions Calls::options(py::handle async_op, py::handle timeout_s) const {
  return {timeout_s.is_none() ? timeout_s_ : timeout_of(timeout_s), flag_of(async_op, "async_op")};
}

MaybeWork Calls::submit(CheckedCall&& checked, py::handle output, py::handle input, const CallOptions& options) {
  MaybeWork work;
  if (host_ != nullptr) {
    const GilRelease nogil;
    work = host_->submit(checked.call, std::move(checked.operands), options);
  } else {
    work = python_.attr("submit")(std::move(checked), output, input, options.async_op, options.timeout_s)
               .cast<MaybeWork>();
  }
  return work == nullptr ? work : keep(std::move(work), py::make_tuple(output, input));
}

MaybeWork Calls::keep(MaybeWork work, py::object tensors) {
  if (work == nullptr) return work;
  work->keep(kept(std::move(tensors)));
  in_flight_.push_back(work);
  drop_finished();
  return work;
}

void Calls::drop_finished() {
  // What is dropped may run code that calls this again.
  while (!in_flight_.empty() && in_flight_.front()->done()) {
    const std::shared_ptr<Work> work = std::move(in_flight_.front());
    in_flight_.pop_front();
    work->release();
  }
}

void Calls::wait() {
  for (const auto in_flight = in_flight_; const std::shared_ptr<Work>& work : in_flight) wait_for(*work, std::nullopt);
  drop_finished();
}

void Calls::clear() {
  const auto in_flight = std::exchange(in_flight_, {});
  for (const std::shared_ptr<Work>& work : in_flight) work->release();
}

void bind_collectives(py::module_& module) {
  bind_call(module);
  CallsClass calls(module, "Calls");
  calls.def(py::init<host::Communicator&>(), py::arg("host"), py::keep_alive<1, 2>())
      .def(py::init<py::object, double>(), py::arg("backend"), py::arg("timeout_s"))
      .def("all_reduce", &all_reduce)
      .def("scan", &scan)
      .def("broadcast", &broadcast)
      .def("reduce", &reduce)
      .def("reduce_scatter", &reduce_scatter)
      .def("all_gather", &all_gather)
      .def("all_to_all", &all_to_all)
      .def("gather", &gather)
      .def("scatter", &scatter)
      .def("barrier", &barrier)
      .def("keep", [](Calls& self, MaybeWork work, py::args tensors) { return self.keep(std::move(work), tensors); })
      .def("wait", &Calls::wait)
      .def("drop_finished", &Calls::drop_finished)
      .def("clear", &Calls::clear);
  bind_messages(calls);
}

}  // namespace pycomm::bindings
