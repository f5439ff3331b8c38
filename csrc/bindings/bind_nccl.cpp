// NCCL and the CUDA driver, loaded at run time, and communicators of them. Calls come checked (calls.hpp), streams as
// the driver's handles.
#include <pybind11/stl.h>

#include <cstddef>
#include <cstring>
#include <tuple>

#include "bindings/bindings.hpp"
#include "bindings/calls.hpp"
#include "cuda/device/signal_pad.hpp"
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

nccl::driver::abi::Stream stream_of(Address stream) { return reinterpret_cast<nccl::driver::abi::Stream>(stream); }
void* pointer(Address address) { return reinterpret_cast<void*>(address); }

using Options = nccl::CallOptions;

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
  py::class_<Operation, Work, std::shared_ptr<Operation>>(module, "NcclOperation")
      .def_property_readonly("seq", &Operation::seq)
      .def_property_readonly("call", [](const Operation& self) { return describe(self.call()); })
      .def_property_readonly("is_message", &Operation::is_message)
      .def_property_readonly("timeout_s", [](const Operation& self) { return self.deadline().timeout_s(); })
      .def("expired", [](const Operation& self) { return self.deadline().expired(); })
      .def("make_wait", [](const Operation& self, Address stream) { self.make_wait(stream_of(stream)); })
      .def(
          "reach", [](const Operation& self, double timeout_s) { return self.reach(timeout_s, &check_signals); },
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
      .def("submit",
           [](Communicator& self, const CheckedCall& checked, const Options& options) {
             const GilRelease nogil;
             return self.submit(checked.call, checked.operands, options);
           })
      .def("submit_kernel",
           [](Communicator& self, const CheckedCall& checked, const py::function& launch, const Options& options) {
             const GilRelease nogil;
             return self.submit_kernel(checked.call, options,
                                       [&](nccl::driver::abi::Stream stream) { launched(launch, stream); });
           })
      .def("exchange", [](Communicator& self, const std::vector<CheckedCall>& calls, const Options& options) {
        std::vector<nccl::Message> messages;
        for (const CheckedCall& checked : calls) messages.push_back({checked.call, checked.operands.output});
        const GilRelease nogil;
        return self.exchange(messages, options);
      });
}

void bind_watch(Class& communicator) {
  communicator.def("error", &Communicator::error, NoGil())
      .def("unfinished", &Communicator::unfinished, NoGil())
      .def("num_calls", [](Communicator& self) { return self.log().num_calls(); })
      .def("num_confirmed", [](Communicator& self) { return self.log().num_confirmed(); })
      .def("confirm", [](Communicator& self, std::uint64_t number) { self.log().confirm(number); })
      .def("hash", [](Communicator& self, std::uint64_t number) { return self.log().hash(number); })
      .def("call", [](Communicator& self, std::uint64_t number) { return CheckedCall{self.log().call(number), {}}; })
      .def("latest", [](Communicator& self) { return CheckedCall{self.log().latest(), {}}; })
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
  module.attr("KERNEL_EXPIRED") = static_cast<std::uint32_t>(cuda::StatusCode::kExpired);
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
