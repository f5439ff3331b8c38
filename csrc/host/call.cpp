#include "pycomm/call.hpp"

namespace pycomm {

namespace {

std::string by_route(const Call& call) {
  switch (call.route) {
    case Route::kBackend:
      return "";
    case Route::kOneShot:
      return ", one-shot kernel";
    case Route::kTwoShot: {
      const Location place = Location::of_bits(call.splits);
      return ", two-shot kernel, at byte " + std::to_string(place.offset()) + " of symmetric memory " +
             std::to_string(place.segment());
    }
  }
  return ", unknown route";
}

}  // namespace

std::string describe(const Call& call) {
  const std::string elements = std::string(name_of(call.dtype)) + "[" + std::to_string(call.count) + "]";
  const std::string root = "root=" + std::to_string(call.root);
  const std::string op = name_of(call.reduce_op);
  const std::string splits = call.splits == 0 ? "" : ", uneven splits with hash " + std::to_string(call.splits);
  const std::string tag = std::to_string(static_cast<std::int64_t>(call.splits));
  switch (call.kind) {
    case OpKind::kNone:
      return "nothing yet";
    case OpKind::kBarrier:
      return "barrier()";
    case OpKind::kAllReduce:
      return "all_reduce(" + op + ", " + elements + by_route(call) + ")";
    case OpKind::kBroadcast:
      return "broadcast(" + root + ", " + elements + ")";
    case OpKind::kReduceScatter:
      return "reduce_scatter(" + op + ", " + elements + splits + ")";
    case OpKind::kAllGather:
      return "all_gather(" + elements + splits + ")";
    case OpKind::kAllToAll:
      return "all_to_all(" + (call.splits == 0 ? elements : std::string(name_of(call.dtype)) + " by splits") + ")";
    case OpKind::kReduce:
      return "reduce(" + root + ", " + op + ", " + elements + ")";
    case OpKind::kGather:
      return "gather(" + root + ", " + elements + " in all)";
    case OpKind::kScatter:
      return "scatter(" + root + ", " + elements + " in all)";
    case OpKind::kSend:
      return "send(dst=" + std::to_string(call.root) + ", tag=" + tag + ", " + elements + ")";
    case OpKind::kRecv:
      return "recv(src=" + (call.root < 0 ? "any" : std::to_string(call.root)) + ", tag=" + tag + ", " + elements + ")";
    case OpKind::kReduceGradients:
      return std::string("reduce_gradients(") + (call.root < 0 ? "to all, " : "to owners, ") + elements + ")";
    case OpKind::kUpdateParameters:
      return std::string("update_parameters(") + (call.root != 0 ? "reducing gradients, " : "") + elements + ")";
    case OpKind::kAwait:
      return "wait_posted(" + std::to_string(call.count) + ")";
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
