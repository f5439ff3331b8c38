// Point-to-point messages of a communicator, with arguments as callers of the Communicator pass them.
#include <pybind11/stl.h>

#include <limits>
#include <tuple>

#include "bindings/arguments.hpp"
#include "bindings/bindings.hpp"
#include "bindings/calls.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

constexpr std::int64_t kStepTag = std::numeric_limits<std::int64_t>::min();  // of steps of collectives in Python

struct Message {
  Message(const Calls& calls, bool send, py::handle argument, py::handle peer, py::handle tag)
      : is_send(send), tensor(send ? calls.read(argument, "the tensor") : calls.written(argument, "the tensor")) {
    call.kind = is_send ? OpKind::kSend : OpKind::kRecv;
    call.dtype = tensor.dtype();
    call.count = tensor.count();
    call.root = is_send || !peer.is_none() ? rank_of(peer, calls.world_size(), is_send ? "dst" : "src") : kAnySource;
    const std::int64_t number = tag_of(tag);
    if (number == kStepTag && calls.host() == nullptr) refuse_tag(tag);
    call.splits = static_cast<std::uint64_t>(number);
  }
  MessageSpec spec() const {
    return {.is_send = is_send,
            .peer = call.root,
            .tag = static_cast<std::int64_t>(call.splits),
            .data = tensor.data(),
            .count = tensor.count(),
            .dtype = tensor.dtype()};
  }

  bool is_send;
  Tensor tensor;
  Call call;
};

using Outcome = std::variant<std::vector<int>, std::shared_ptr<Work>>;  // sources, or a Work if asynchronous

/// By a back end in Python.
Outcome exchange_in_python(Calls& self, const std::vector<Message>& messages, const CallOptions& options) {
  py::list rows;
  for (const Message& message : messages) {
    void* const data = message.tensor.data();
    rows.append(py::make_tuple(CheckedCall{message.call, {data, data, {}, {}}}, message.tensor.object()));
  }
  const py::object outcome = self.python().attr("exchange")(rows, options.async_op, options.timeout_s);
  if (options.async_op) return self.keep(outcome.cast<MaybeWork>(), rows);
  return outcome.cast<std::vector<int>>();
}

Outcome run(Calls& self, const std::vector<Message>& messages, const CallOptions& options) {
  if (self.host() == nullptr) return exchange_in_python(self, messages, options);
  std::vector<MessageSpec> specs;
  py::list tensors;
  specs.reserve(messages.size());
  for (const Message& message : messages) {
    specs.push_back(message.spec());
    if (options.async_op) tensors.append(message.tensor.object());
  }
  MaybeWork work;
  {
    const GilRelease nogil;
    if (!options.async_op) return self.host()->run_messages(specs, options.timeout_s);
    work = self.host()->start_messages(specs, options.timeout_s);
  }
  return self.keep(std::move(work), tensors);
}

MaybeWork send(Calls& self, py::handle tensor, py::handle dst, py::handle tag, py::handle async_op,
               py::handle timeout_s) {
  const Message message(self, true, tensor, dst, tag);
  const CallOptions options = self.options(async_op, timeout_s);
  if (self.host() == nullptr || options.async_op) {
    const Outcome outcome = run(self, {message}, options);
    return options.async_op ? std::get<MaybeWork>(outcome) : nullptr;
  }
  const GilRelease nogil;
  self.host()->send(message.spec(), options.timeout_s);
  return nullptr;
}

/// The source, or a Work if asynchronous.
std::variant<int, MaybeWork> recv(Calls& self, py::handle tensor, py::handle src, py::handle tag, py::handle async_op,
                                  py::handle timeout_s) {
  const Message message(self, false, tensor, src, tag);
  const CallOptions options = self.options(async_op, timeout_s);
  if (self.host() == nullptr || options.async_op) {
    const Outcome outcome = run(self, {message}, options);
    if (options.async_op) return std::get<MaybeWork>(outcome);
    return std::get<std::vector<int>>(outcome).front();
  }
  const GilRelease nogil;
  return self.host()->recv(message.spec(), options.timeout_s);
}

/// Messages (is_send, tensor, peer, tag) that progress together.
Outcome exchange(Calls& self, const std::vector<std::tuple<bool, py::handle, py::handle, py::handle>>& rows,
                 py::handle async_op, py::handle timeout_s) {
  std::vector<Message> messages;
  messages.reserve(rows.size());
  for (const auto& [is_send, tensor, peer, tag] : rows) messages.emplace_back(self, is_send, tensor, peer, tag);
  return run(self, messages, self.options(async_op, timeout_s));
}

/// A Work, or None if nobody has sent such a message yet. On the host transport.
MaybeWork receive_arrived(Calls& self, py::handle tensor, py::handle tag, py::handle timeout_s) {
  const Message message(self, false, tensor, py::none(), tag);
  const CallOptions options = self.options(py::bool_(true), timeout_s);
  MaybeWork work;
  {
    const GilRelease nogil;
    work = self.host()->receive_arrived(message.spec(), options.timeout_s);
  }
  return self.keep(std::move(work), py::make_tuple(message.tensor.object()));
}

}  // namespace

void bind_messages(CallsClass& calls) {
  calls.attr("STEP_TAG") = kStepTag;
  calls.def("send", &send).def("recv", &recv).def("exchange", &exchange).def("receive_arrived", &receive_arrived);
}

}  // namespace pycomm::bindings
