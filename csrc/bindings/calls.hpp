// A back end as its communicator calls it: the one place where arguments of calls are checked, whoever the back end is.
// The host transport's calls pass to it at once; those of back ends in Python get the Call and the checked tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <memory>
#include <utility>

#include "bindings/tensor.hpp"
#include "bindings/work.hpp"
#include "host/communicator.hpp"
#include "pycomm/backend.hpp"

namespace pycomm::bindings {

/// What Python sees of a call: all of it.
struct CheckedCall {
  Call call;
  Operands operands;
};

class Calls {
 public:
  /// Of the host transport, which whoever makes this keeps.
  explicit Calls(host::Communicator& host);
  /// Of a back end in Python. `timeout_s`: of calls that are given none.
  Calls(pybind11::object backend, double timeout_s);

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }

  Tensor read(pybind11::handle tensor, const char* name) const { return {tensor, name, Access::kRead, device_}; }
  Tensor written(pybind11::handle tensor, const char* name) const { return {tensor, name, Access::kWrite, device_}; }
  CallOptions options(pybind11::handle async_op, pybind11::handle timeout_s) const;

  /// Hand over a checked collective. `output` and `input`: the tensors of its operands, or None.
  MaybeWork submit(CheckedCall&& checked, pybind11::handle output, pybind11::handle input, const CallOptions& options);

  /// nullptr: a back end in Python, python().
  host::Communicator* host() const { return host_; }
  const pybind11::object& python() const { return python_; }

  /// What `work` reads and writes stays until it is over, whoever drops it.
  MaybeWork keep(MaybeWork work, pybind11::object tensors);
  /// Wait for all that are under way now; throws what went wrong in the first of them that failed.
  void wait();
  void drop_finished();
  void clear();

 private:
  host::Communicator* host_ = nullptr;
  pybind11::object python_;
  int rank_;
  int world_size_;
  double timeout_s_;
  dlpack::Device device_ = kHost;
  std::deque<std::shared_ptr<Work>> in_flight_;  // in the order of their calls; under Python's lock
};

using CallsClass = pybind11::class_<Calls>;
void bind_messages(CallsClass& calls);

}  // namespace pycomm::bindings
