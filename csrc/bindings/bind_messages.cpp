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
using Source = std::optional<int>;  // none: any

MessageSpec spec_of(const Communicator& self, bool is_send, py::handle argument, Source peer, std::int64_t tag) {
  const Tensor tensor(argument, "the tensor");
  if (peer) check_rank(*peer, self.world_size(), is_send ? "dst" : "src");
  return {.is_send = is_send,
          .peer = peer.value_or(host::kAnySource),
          .tag = tag,
          .data = tensor.data(),
          .count = tensor.count(),
          .dtype = tensor.moved_dtype()};
}

std::shared_ptr<host::Work> send(Communicator& self, py::handle tensor, int dst, std::int64_t tag, bool async_op,
                                 Timeout timeout_s) {
  const MessageSpec spec = spec_of(self, true, tensor, dst, tag);
  const host::CallOptions options = options_of(self, async_op, timeout_s);
  const py::gil_scoped_release nogil;
  if (async_op) return self.start_messages({spec}, options.timeout_s);
  self.send(spec, options.timeout_s);
  return nullptr;
}

/// The source, or a Work if asynchronous.
std::variant<int, std::shared_ptr<host::Work>> recv(Communicator& self, py::handle tensor, Source src, std::int64_t tag,
                                                    bool async_op, Timeout timeout_s) {
  const MessageSpec spec = spec_of(self, false, tensor, src, tag);
  const host::CallOptions options = options_of(self, async_op, timeout_s);
  const py::gil_scoped_release nogil;
  if (async_op) return self.start_messages({spec}, options.timeout_s);
  return self.recv(spec, options.timeout_s);
}

/// Messages (is_send, tensor, peer, tag) that progress together: their sources, or a Work if asynchronous.
std::variant<std::vector<int>, std::shared_ptr<host::Work>> exchange(
    Communicator& self, const std::vector<std::tuple<bool, py::handle, Source, std::int64_t>>& messages, bool async_op,
    Timeout timeout_s) {
  std::vector<MessageSpec> specs;
  specs.reserve(messages.size());
  for (const auto& [is_send, tensor, peer, tag] : messages) {
    specs.push_back(spec_of(self, is_send, tensor, peer, tag));
  }
  const host::CallOptions options = options_of(self, async_op, timeout_s);
  const py::gil_scoped_release nogil;
  if (async_op) return self.start_messages(specs, options.timeout_s);
  return self.run_messages(specs, options.timeout_s);
}

}  // namespace

void bind_messages(CommunicatorClass& communicator) {
  communicator.def("send", &send).def("recv", &recv).def("exchange", &exchange);
}

}  // namespace pycomm::bindings
