// NCCL and the CUDA driver, loaded at run time, and communicators of them. Tensors come as addresses, checked before by
// pycomm/arguments.py; streams as the driver's handles.
#include <pybind11/stl.h>

#include <cstddef>
#include <cstring>
#include <tuple>

#include "bindings/bindings.hpp"
#include "bindings/names.hpp"
#include "cuda/device/signal_pad.hpp"
#include "host/parts.hpp"
#include "nccl/communicator.hpp"
#include "nccl/window.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using nccl::Communicator;
using nccl::Library;
using nccl::OperationPtr;
using nccl::driver::Driver;
using Address = std::uintptr_t;

static_assert(sizeof(nccl::KernelStatus) == sizeof(cuda::Status));
static_assert(offsetof(nccl::KernelStatus, seen) == offsetof(cuda::Status, seen));

using Holder = std::shared_ptr<Communicator>;  // windows keep theirs

Holder held(std::unique_ptr<Communicator> communicator) { return {communicator.release(), WithoutGil{}}; }

DType dtype_of(std::string_view name) { return parse<DType>(name, kNumDTypes, "dtype"); }
ReduceOp op_of(std::string_view name) { return parse<ReduceOp>(name, kNumReduceOps, "reduce op"); }

nccl::driver::abi::Stream stream_of(Address stream) { return reinterpret_cast<nccl::driver::abi::Stream>(stream); }
void* pointer(Address address) { return reinterpret_cast<void*>(address); }

nccl::Buffers buffers_of(Address output, Address input, std::string_view dtype) {
  return {.input = pointer(input), .output = pointer(output), .dtype = dtype_of(dtype)};
}

nccl::Parts parts_of(std::vector<std::uint64_t> counts) {
  const std::uint64_t splits = host::Parts(counts).hash();
  return {.counts = std::move(counts), .splits = splits};
}

using Options = nccl::CallOptions;

template <class Call>
OperationPtr without_gil(const Call& call) {
  const GilRelease nogil;
  return call();
}

void bind_libraries(py::module_& module) {
  py::class_<Library, std::shared_ptr<Library>>(module, "NcclLibrary")
      .def(py::init<const std::vector<std::string>&>(), py::arg("names"))
      .def_property_readonly("file", &Library::file)
      .def_property_readonly("version_code", &Library::version)
      .def_property_readonly("version", [](const Library& self) { return nccl::version_text(self.version()); })
      .def_property_readonly("has_call_config", &Library::has_call_config)
      .def_property_readonly("has_windows", &Library::has_windows)
      .def("unique_id", [](const Library& self) {
        nccl::abi::UniqueId id;
        const nccl::abi::Result result = self.get_unique_id(&id);
        if (result != nccl::abi::kSuccess) {
          throw Error(ErrorKind::kGeneral, "ncclGetUniqueId: " + self.describe(result, nullptr));
        }
        return py::bytes(id.internal, sizeof(id.internal));
      });
  module.def("nccl_version_text", &nccl::version_text);

  py::class_<Driver, std::shared_ptr<Driver>>(module, "CudaDriver")
      .def(py::init<const std::vector<std::string>&>(), py::arg("names"))
      .def_property_readonly("file", &Driver::file)
      .def_property_readonly("version", &Driver::version)
      .def("device_names", &Driver::device_names)
      .def("device_uuid", &Driver::device_uuid, py::arg("index"))
      .def("allow_queries_during_capture", &Driver::allow_queries_during_capture);

  py::class_<nccl::Device, std::shared_ptr<nccl::Device>>(module, "CudaDevice")
      .def(py::init([](std::shared_ptr<Driver> driver, int index) {
             return std::make_shared<nccl::Device>(std::move(driver), index);
           }),
           py::arg("driver"), py::arg("index"));
}

void bind_operation(py::module_& module) {
  using nccl::Operation;
  py::class_<Operation, std::shared_ptr<Operation>>(module, "NcclOperation")
      .def_property_readonly("seq", &Operation::seq)
      .def_property_readonly("call", [](const Operation& self) { return describe(self.call()); })
      .def_property_readonly("peer",
                             [](const Operation& self) -> std::optional<int> {
                               const bool is_message =
                                   self.call().kind == OpKind::kSend || self.call().kind == OpKind::kRecv;
                               return is_message ? std::optional(self.call().root) : std::nullopt;
                             })
      .def_property_readonly("timeout_s", [](const Operation& self) { return self.deadline().timeout_s(); })
      .def("expired", [](const Operation& self) { return self.deadline().expired(); })
      .def("over", &Operation::over)
      .def("passed", &Operation::passed)
      .def("make_wait", [](const Operation& self, Address stream) { self.make_wait(stream_of(stream)); })
      .def(
          "wait", [](const Operation& self, double timeout_s) { return self.wait(timeout_s, &check_signals); },
          py::arg("timeout_s"), NoGil());
}

using Class = py::class_<Communicator, Holder>;

/// The call has been logged: what its launcher refuses is no wrong argument any more, and ends the group.
void launched(const py::function& launch, nccl::driver::abi::Stream stream) {
  const py::gil_scoped_acquire gil;
  try {
    launch(reinterpret_cast<Address>(stream));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ValueError)) throw;
    throw Error(ErrorKind::kGeneral, error.what());
  }
}

void bind_calls(Class& communicator) {
  communicator
      .def("all_reduce",
           [](Communicator& self, Address data, std::uint64_t count, std::string_view dtype, std::string_view op,
              const Options& options) {
             const nccl::Buffers buffers = buffers_of(data, data, dtype);
             const ReduceOp reduce_op = op_of(op);
             return without_gil([&] { return self.all_reduce(buffers, count, reduce_op, options); });
           })
      .def("all_reduce_by_kernel",
           [](Communicator& self, bool one_shot, std::uint64_t memory, std::uint64_t offset, std::uint64_t count,
              std::string_view dtype, std::string_view op, const py::function& launch, const Options& options) {
             const Route route = one_shot ? Route::kOneShot : Route::kTwoShot;
             const DType element = dtype_of(dtype);
             const ReduceOp reduce_op = op_of(op);
             const nccl::Launch put = [&](nccl::driver::abi::Stream stream) { launched(launch, stream); };
             return without_gil([&] {
               return self.all_reduce_by_kernel(route, Location(memory, offset), element, count, reduce_op, options,
                                                put);
             });
           })
      .def("broadcast",
           [](Communicator& self, Address data, std::uint64_t count, std::string_view dtype, int root,
              const Options& options) {
             const nccl::Buffers buffers = buffers_of(data, data, dtype);
             return without_gil([&] { return self.broadcast(buffers, count, root, options); });
           })
      .def("reduce",
           [](Communicator& self, Address data, std::uint64_t count, std::string_view dtype, int root,
              std::string_view op, const Options& options) {
             const nccl::Buffers buffers = buffers_of(data, data, dtype);
             const ReduceOp reduce_op = op_of(op);
             return without_gil([&] { return self.reduce(buffers, count, root, reduce_op, options); });
           })
      .def("reduce_scatter",
           [](Communicator& self, Address output, Address input, std::vector<std::uint64_t> counts,
              std::string_view dtype, std::string_view op, const Options& options) {
             const nccl::Buffers buffers = buffers_of(output, input, dtype);
             const nccl::Parts parts = parts_of(std::move(counts));
             const ReduceOp reduce_op = op_of(op);
             return without_gil([&] { return self.reduce_scatter(buffers, parts, reduce_op, options); });
           })
      .def("all_gather",
           [](Communicator& self, Address output, Address input, std::vector<std::uint64_t> counts,
              std::string_view dtype, const Options& options) {
             const nccl::Buffers buffers = buffers_of(output, input, dtype);
             const nccl::Parts parts = parts_of(std::move(counts));
             return without_gil([&] { return self.all_gather(buffers, parts, options); });
           })
      .def("all_to_all",
           [](Communicator& self, Address output, Address input, std::vector<std::uint64_t> output_counts,
              std::vector<std::uint64_t> input_counts, bool by_splits, std::string_view dtype, const Options& options) {
             const nccl::Buffers buffers = buffers_of(output, input, dtype);
             const nccl::Parts to{.counts = std::move(output_counts), .splits = by_splits ? 1U : 0U};
             const nccl::Parts from{.counts = std::move(input_counts), .splits = to.splits};
             return without_gil([&] { return self.all_to_all(buffers, to, from, options); });
           })
      .def("gather",
           [](Communicator& self, Address output, Address input, std::uint64_t count, std::string_view dtype, int root,
              const Options& options) {
             const nccl::Buffers buffers = buffers_of(output, input, dtype);
             return without_gil([&] { return self.gather(buffers, count, root, options); });
           })
      .def("scatter",
           [](Communicator& self, Address output, Address input, std::uint64_t count, std::string_view dtype, int root,
              const Options& options) {
             const nccl::Buffers buffers = buffers_of(output, input, dtype);
             return without_gil([&] { return self.scatter(buffers, count, root, options); });
           })
      .def("barrier",
           [](Communicator& self, Address byte, const Options& options) {
             return without_gil([&] { return self.barrier(pointer(byte), options); });
           })
      .def("exchange",
           [](Communicator& self,
              const std::vector<std::tuple<bool, Address, std::uint64_t, std::string, int, std::int64_t>>& rows,
              const Options& options) {
             std::vector<nccl::Message> messages;
             for (const auto& [is_send, data, count, dtype, peer, tag] : rows) {
               messages.push_back({is_send, pointer(data), count, dtype_of(dtype), peer, tag});
             }
             return without_gil([&] { return self.exchange(messages, options); });
           });
}

void bind_watch(Class& communicator) {
  communicator.def("error", &Communicator::error, NoGil())
      .def("unfinished", &Communicator::unfinished, NoGil())
      .def("num_calls", [](Communicator& self) { return self.log().num_calls(); })
      .def("num_confirmed", [](Communicator& self) { return self.log().num_confirmed(); })
      .def("confirm", [](Communicator& self, std::uint64_t number) { self.log().confirm(number); })
      .def("hash", [](Communicator& self, std::uint64_t number) { return self.log().hash(number); })
      .def("packed_call",
           [](Communicator& self, std::uint64_t number) {
             const Call call = self.log().call(number);
             return py::bytes(reinterpret_cast<const char*>(&call), sizeof(call));
           })
      .def("packed_latest",
           [](Communicator& self) {
             const Call call = self.log().latest();
             return py::bytes(reinterpret_cast<const char*>(&call), sizeof(call));
           })
      .def("num_messages", [](Communicator& self) { return self.log().num_messages(); })
      .def("take_messages",
           [](Communicator& self, std::size_t most) {
             const std::vector<nccl::LoggedMessage> taken = self.log().take_messages(most);
             return py::bytes(reinterpret_cast<const char*>(taken.data()), taken.size() * sizeof(taken[0]));
           })
      .def(
          "watch_kernels",
          [](Communicator& self, Address abort_word, Address status, const py::object&) {
            self.kernels().add(abort_word, static_cast<const nccl::KernelStatus*>(pointer(status)));
          },
          py::arg("abort_word"), py::arg("status"), py::arg("owner") = py::none(), py::keep_alive<1, 4>())
      .def("forget_kernels", [](Communicator& self, Address abort_word) { self.kernels().remove(abort_word); })
      .def("kernel_failures", [](Communicator& self) {
        std::vector<std::tuple<std::uint32_t, int, int, std::uint32_t, std::uint32_t>> rows;
        for (const nccl::KernelStatus& status : self.kernels().failures()) {
          rows.emplace_back(status.code, status.rank, status.block, status.expected, status.seen);
        }
        return rows;
      });
}

}  // namespace

void bind_nccl(py::module_& module) {
  bind_libraries(module);
  bind_operation(module);
  module.def(
      "describe_call",
      [](const std::string& packed) {
        if (packed.size() != sizeof(Call))
          throw py::value_error("a call has " + std::to_string(sizeof(Call)) + " bytes");
        Call call;
        std::memcpy(&call, packed.data(), sizeof(call));
        return describe(call);
      },
      py::arg("packed"));

  py::class_<Options>(module, "NcclOptions")
      .def(py::init([](Address stream, bool async_op, double timeout_s, int max_ctas) {
             return Options{stream_of(stream), async_op, timeout_s, max_ctas};
           }),
           py::arg("stream"), py::arg("async_op"), py::arg("timeout_s"), py::arg("max_ctas"));

  Class communicator(module, "NcclCommunicator");
  communicator
      .def(py::init(
               [](std::shared_ptr<Library> library, std::shared_ptr<nccl::Device> device, int rank, int world_size) {
                 return held(std::make_unique<Communicator>(std::move(library), std::move(device), rank, world_size,
                                                            &check_signals));
               }),
           py::arg("library"), py::arg("device"), py::arg("rank"), py::arg("world_size"))
      .def(
          "connect",
          [](Communicator& self, const std::string& id, double timeout_s) {
            nccl::abi::UniqueId unique_id;
            if (id.size() != sizeof(unique_id.internal)) throw std::invalid_argument("a unique id has 128 bytes");
            std::memcpy(unique_id.internal, id.data(), id.size());
            self.connect(unique_id, timeout_s);
          },
          NoGil())
      .def(
          "split",
          [](Communicator& self, std::optional<int> color, int rank, int world_size, double timeout_s) {
            auto part = self.split(color, rank, world_size, timeout_s);
            return part ? held(std::move(part)) : nullptr;
          },
          NoGil())
      .def("aborted", &Communicator::aborted)
      .def("abort", &Communicator::abort, NoGil())
      .def("close", &Communicator::close, NoGil());
  bind_calls(communicator);
  bind_watch(communicator);

  py::class_<nccl::Window, std::shared_ptr<nccl::Window>>(module, "NcclWindow")
      .def(py::init<Holder, std::size_t>(), py::arg("communicator"), py::arg("bytes"), NoGil())
      .def("open", &nccl::Window::open, NoGil())
      .def_property_readonly("bytes", &nccl::Window::bytes)
      .def_property_readonly("parts", [](const nccl::Window& self) {
        std::vector<Address> addresses;
        for (const std::byte* part : self.parts()) addresses.push_back(reinterpret_cast<Address>(part));
        return addresses;
      });
}

}  // namespace pycomm::bindings
