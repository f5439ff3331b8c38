#include "pycomm/call.hpp"

namespace pycomm {

std::string describe(const Call& call) {
  const std::string elements = std::string(name_of(call.dtype)) + "[" + std::to_string(call.count) + "]";
  switch (call.kind) {
    case OpKind::kNone:
      return "nothing yet";
    case OpKind::kBarrier:
      return "barrier()";
    case OpKind::kAllReduce:
      return std::string("all_reduce(") + name_of(call.reduce_op) + ", " + elements + ")";
    case OpKind::kBroadcast:
      return "broadcast(root=" + std::to_string(call.root) + ", " + elements + ")";
    case OpKind::kAllocate:
      return "empty(" + std::to_string(call.count) + " bytes)";
    case OpKind::kSplit:
      return "split()";
    case OpKind::kExchange:
      return "exchange(" + std::to_string(call.count) + " bytes)";
  }
  return "unknown operation " + std::to_string(static_cast<int>(call.kind));
}

}  // namespace pycomm
