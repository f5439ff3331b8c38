// Point-to-point messages of HostCommunicator, with arguments as callers of the Communicator pass them.
#include <pybind11/stl.h>

#include <tuple>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using host::Communicator;
using host::MessageSpec;

/// `peer`: where a send goes, or whom a receive is from (None: any source).
MessageSpec spec_of(const Communicator& self, bool is_send, py::handle argument, py::handle peer, py::handle tag) {
  const Tensor tensor(argument, "the tensor", is_send ? Access::kRead : Access::kWrite);
  const int rank =
      is_send ? rank_of(peer, self.world_size(), "dst") : source_of(peer, self.world_size()).value_or(host::kAnySource);
  return {.is_send = is_send,
          .peer = rank,
          .tag = tag_of(tag),
          .data = tensor.data(),
          .count = tensor.count(),
          .dtype = tensor.dtype()};
}

std::shared_ptr<host::Work> send(Communicator& self, py::handle tensor, py::handle dst, py::handle tag,
                                 py::handle async_op, py::handle timeout_s) {
  const MessageSpec spec = spec_of(self, true, tensor, dst, tag);
  const host::CallOptions options = options_of(self, async_op, timeout_s);
  const GilRelease nogil;
  if (options.async_op) return self.start_messages({spec}, options.timeout_s);
  self.send(spec, options.timeout_s);
  return nullptr;
}

/// The source, or a Work if asynchronous.
std::variant<int, std::shared_ptr<host::Work>> recv(Communicator& self, py::handle tensor, py::handle src,
                                                    py::handle tag, py::handle async_op, py::handle timeout_s) {
  const MessageSpec spec = spec_of(self, false, tensor, src, tag);
  const host::CallOptions options = options_of(self, async_op, timeout_s);
  const GilRelease nogil;
  if (options.async_op) return self.start_messages({spec}, options.timeout_s);
  return self.recv(spec, options.timeout_s);
}

/// A Work, or None if nobody has sent such a message yet.
std::shared_ptr<host::Work> receive_arrived(Communicator& self, py::handle tensor, py::handle tag,
                                            py::handle timeout_s) {
  const MessageSpec spec = spec_of(self, false, tensor, py::none(), tag);
  const host::CallOptions options = options_of(self, py::bool_(true), timeout_s);
  const GilRelease nogil;
  return self.receive_arrived(spec, options.timeout_s);
}

/// Messages (is_send, tensor, peer, tag) that progress together: their sources, or a Work if asynchronous.
std::variant<std::vector<int>, std::shared_ptr<host::Work>> exchange(
    Communicator& self, const std::vector<std::tuple<bool, py::handle, py::handle, py::handle>>& messages,
    py::handle async_op, py::handle timeout_s) {
  std::vector<MessageSpec> specs;
  specs.reserve(messages.size());
  for (const auto& [is_send, tensor, peer, tag] : messages) {
    specs.push_back(spec_of(self, is_send, tensor, peer, tag));
  }
  const host::CallOptions options = options_of(self, async_op, timeout_s);
  const GilRelease nogil;
  if (options.async_op) return self.start_messages(specs, options.timeout_s);
  return self.run_messages(specs, options.timeout_s);
}

}  // namespace

void bind_messages(CommunicatorClass& communicator) {
  communicator.def("send", &send)
      .def("recv", &recv)
      .def("exchange", &exchange)
      .def("receive_arrived", &receive_arrived);
}

}  // namespace pycomm::bindings
