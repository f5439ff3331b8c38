// What a back end written in C++ is for the bindings, which check the arguments of every call, once for all back ends,
// and hand it a Call with the memory of this rank. Those in Python: pycomm/backends/__init__.py.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "pycomm/call.hpp"
#include "pycomm/parts.hpp"
#include "pycomm/work.hpp"

namespace pycomm {

/// The memory of one rank in a call; a side that this rank does not have is nullptr, both are one tensor in place.
/// Parts, where a side has some: one a rank.
struct Operands {
  const void* input = nullptr;
  void* output = nullptr;
  Parts input_parts;
  Parts output_parts;
};

struct CallOptions {
  double timeout_s = 600;
  bool async_op = false;
};

inline constexpr int kAnySource = -1;

/// What the caller asks for. `peer`: destination, or source (kAnySource: any).
struct MessageSpec {
  bool is_send = false;
  int peer = 0;
  std::int64_t tag = 0;
  void* data = nullptr;
  std::size_t count = 0;
  DType dtype = DType::kUInt8;

  std::size_t bytes() const { return count * size_of(dtype); }
};

/// Called without Python's lock. Memory stays valid until the call, or its Work, is over.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual int rank() const = 0;
  virtual int world_size() const = 0;
  /// Of calls that are given none.
  virtual double timeout_s() const = 0;

  /// A collective. Returns its Work if asynchronous, else nullptr.
  virtual std::shared_ptr<Work> submit(const Call& call, Operands&& operands, const CallOptions& options) = 0;

  // Messages, independent of collectives. Those of a batch progress together.
  virtual void send(const MessageSpec& spec, double timeout_s) = 0;
  /// Returns the source.
  virtual int recv(const MessageSpec& spec, double timeout_s) = 0;
  /// Returns their sources (a send's: its destination).
  virtual std::vector<int> run_messages(const std::vector<MessageSpec>& specs, double timeout_s) = 0;
  virtual std::shared_ptr<Work> start_messages(const std::vector<MessageSpec>& specs, double timeout_s) = 0;
};

}  // namespace pycomm
