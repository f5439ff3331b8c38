// Point-to-point messages of HostCommunicator. A message is (is_send, address, elements, dtype, peer, tag); peer -1:
// any source.
#include <pybind11/stl.h>

#include <tuple>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using host::Communicator;
using host::MessageSpec;
using Spec = std::tuple<bool, std::uintptr_t, std::size_t, int, int, std::int64_t>;

MessageSpec spec_of(const Spec& spec) {
  const auto [is_send, address, count, dtype, peer, tag] = spec;
  return {.is_send = is_send,
          .peer = peer,
          .tag = tag,
          .data = reinterpret_cast<void*>(address),
          .count = count,
          .dtype = static_cast<DType>(dtype)};
}

/// A Work if asynchronous, else the sources.
py::object exchange(Communicator& self, const std::vector<Spec>& messages, bool async_op, double timeout_s) {
  std::vector<MessageSpec> specs;
  specs.reserve(messages.size());
  for (const Spec& message : messages) specs.push_back(spec_of(message));
  std::vector<int> sources;
  std::shared_ptr<host::Work> work;
  {
    const py::gil_scoped_release nogil;
    work = self.exchange_messages(specs, {timeout_s, async_op}, &sources);
  }
  return work != nullptr ? py::cast(work) : py::cast(sources);
}

}  // namespace

void bind_messages(CommunicatorClass& communicator) {
  communicator.def("exchange_messages", &exchange)
      .def(
          "send",
          [](Communicator& self, std::uintptr_t address, std::size_t count, int dtype, int dst, std::int64_t tag,
             bool async_op, double timeout_s) {
            return self.exchange_messages({spec_of(Spec(true, address, count, dtype, dst, tag))}, {timeout_s, async_op},
                                          nullptr);
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "receive_arrived",
          [](Communicator& self, std::uintptr_t address, std::size_t count, int dtype, std::int64_t tag,
             double timeout_s) {
            return self.receive_arrived(spec_of(Spec(false, address, count, dtype, host::kAnySource, tag)), timeout_s);
          },
          py::call_guard<py::gil_scoped_release>())
      .def("recv",
           [](Communicator& self, std::uintptr_t address, std::size_t count, int dtype, int src, std::int64_t tag,
              bool async_op, double timeout_s) -> py::object {
             std::vector<int> sources;
             std::shared_ptr<host::Work> work;
             {
               const py::gil_scoped_release nogil;
               work = self.exchange_messages({spec_of(Spec(false, address, count, dtype, src, tag))},
                                             {timeout_s, async_op}, &sources);
             }
             return work != nullptr ? py::cast(work) : py::int_(sources.front());
           });
}

}  // namespace pycomm::bindings
