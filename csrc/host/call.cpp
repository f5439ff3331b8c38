#include "pycomm/call.hpp"

#include <stdexcept>

namespace pycomm {

namespace {

std::string by_route(const Call& call) {
  if (call.route == Route::kBackend) return "";
  const Location place = Location::of_bits(call.splits);
  return std::string(", ") + name_of(call.route) + " kernel" +
         (place.symmetric() ? ", at byte " + std::to_string(place.offset()) + " of symmetric memory " +
                                  std::to_string(place.segment())
                            : "");
}

/// What a letter of OpText::arguments stands for.
std::string argument(char letter, const Call& call) {
  const std::string dtype = name_of(call.dtype);
  const std::string elements = dtype + "[" + std::to_string(call.count) + "]";
  switch (letter) {
    case 'o':
      return name_of(call.reduce_op);
    case 'e':
      return elements;
    case 'r':
      return "root=" + std::to_string(call.root);
    case 's':
      return call.splits == 0 ? "" : ", uneven splits with hash " + std::to_string(call.splits);
    case 'p':
      return call.root < 0 ? "any" : std::to_string(call.root);
    case 't':
      return std::to_string(static_cast<std::int64_t>(call.splits));
    case 'n':
      return std::to_string(call.count);
    case 'k':
      return by_route(call);
    case 'v':  // splits that each rank chooses
      return call.splits == 0 ? elements : dtype + " by splits";
    case 'd':  // where averages go
      return call.root < 0 ? "to all" : "to owners";
    default:  // 'u': what an update does besides
      return call.root != 0 ? "reducing gradients, " : "";
  }
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

bool is_known(const Call& call) {
  return static_cast<int>(call.kind) < kNumOpKinds && static_cast<int>(call.dtype) < kNumDTypes &&
         static_cast<int>(call.reduce_op) < kNumReduceOps && static_cast<int>(call.route) < kNumRoutes;
}

std::string describe(const Call& call) {
  if (!is_known(call)) return "unknown operation " + std::to_string(static_cast<int>(call.kind));
  if (call.kind == OpKind::kNone) return "nothing yet";
  std::string text = std::string(name_of(call.kind)) + "(";
  for (const char* at = kOpTexts[static_cast<int>(call.kind)].arguments; *at != '\0'; ++at) {
    text += *at == '%' ? argument(*++at, call) : std::string(1, *at);
  }
  return text + ")";
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
