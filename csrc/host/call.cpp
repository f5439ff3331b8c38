#include "pycomm/call.hpp"

#include <stdexcept>

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

[[noreturn]] void refuse(DType dtype, ReduceOp op, const char* why) {
  throw std::invalid_argument(std::string(name_of(op)) + " of " + name_of(dtype) + " is not defined" + why);
}

Arithmetic of_complex(DType dtype, ReduceOp op) {
  if (op != ReduceOp::kSum && op != ReduceOp::kAvg) {
    refuse(dtype, op, ": complex numbers have no order, and are not multiplied here; they take sum and avg");
  }
  if (dtype == DType::kComplex32) return {DType::kFloat16, op, 2};
  return {dtype == DType::kComplex64 ? DType::kFloat32 : DType::kFloat64, op, 2};
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
    case OpKind::kAgree:
      return "agree(row[" + std::to_string(call.count) + "])";
  }
  return "unknown operation " + std::to_string(static_cast<int>(call.kind));
}

Arithmetic arithmetic_of(DType dtype, ReduceOp op) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kFloat64:
    case DType::kFloat16:
    case DType::kBFloat16:
      return {dtype, op};
    case DType::kInt8:
    case DType::kUInt8:
    case DType::kInt32:
    case DType::kInt64:
      if (op == ReduceOp::kAvg) refuse(dtype, op, "; sum it and divide, or convert it to a floating-point type");
      return {dtype, op};
    case DType::kBool:
      if (op == ReduceOp::kAvg) refuse(dtype, op, "; convert it to a floating-point type");
      return {DType::kUInt8, op == ReduceOp::kSum || op == ReduceOp::kMax ? ReduceOp::kMax : ReduceOp::kMin};
    case DType::kComplex32:
    case DType::kComplex64:
    case DType::kComplex128:
      return of_complex(dtype, op);
    default:
      break;
  }
  std::string names;
  for (int d = 0; d < kNumNumberTypes; ++d) names += std::string(name_of(static_cast<DType>(d))) + ", ";
  throw std::invalid_argument("dtype " + std::string(name_of(dtype)) + " is not supported by reductions, which take " +
                              names + "bool and complex numbers; other calls move it");
}

}  // namespace pycomm
