#include <algorithm>
#include <bit>

#include "world.hpp"

namespace standin {

namespace {

struct Bfloat {
  std::uint16_t bits;
  explicit operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
  static Bfloat of(float value) {
    const auto wide = std::bit_cast<std::uint32_t>(value);
    return {static_cast<std::uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
  }
};

template <class T, class Wide, class Narrow>
void reduce_as(char* output, const std::vector<const char*>& inputs, std::size_t count, RedOp op, Narrow narrow) {
  for (std::size_t i = 0; i < count; ++i) {
    const auto value = [&](const char* input) { return static_cast<Wide>(reinterpret_cast<const T*>(input)[i]); };
    Wide total = value(inputs.back());
    for (std::size_t k = inputs.size() - 1; k-- > 0;) {
      const Wide next = value(inputs[k]);
      if (op == kSum || op == kAvg) total = static_cast<Wide>(total + next);
      if (op == kProd) total = static_cast<Wide>(total * next);
      if (op == kMax) total = std::max(total, next);
      if (op == kMin) total = std::min(total, next);
    }
    if (op == kAvg) total = static_cast<Wide>(total / static_cast<Wide>(inputs.size()));
    reinterpret_cast<T*>(output)[i] = narrow(total);
  }
}

template <class T, class Wide = T>
void reduce_plain(char* output, const std::vector<const char*>& inputs, std::size_t count, RedOp op) {
  reduce_as<T, Wide>(output, inputs, count, op, [](Wide value) { return static_cast<T>(value); });
}

}  // namespace

std::size_t size_of(DataType type) {
  switch (type) {
    case kInt8:
    case kUint8:
      return 1;
    case kFloat16:
    case kBfloat16:
      return 2;
    case kInt32:
    case kFloat32:
      return 4;
    default:
      return 8;
  }
}

void reduce_values(char* output, const std::vector<const char*>& inputs, std::size_t count, DataType type, RedOp op) {
  switch (type) {
    case kInt8:
      return reduce_plain<std::int8_t>(output, inputs, count, op);
    case kUint8:
      return reduce_plain<std::uint8_t>(output, inputs, count, op);
    case kInt32:
      return reduce_plain<std::int32_t>(output, inputs, count, op);
    case kInt64:
      return reduce_plain<std::int64_t>(output, inputs, count, op);
    case kFloat16:
      return reduce_plain<_Float16, float>(output, inputs, count, op);
    case kFloat32:
      return reduce_plain<float>(output, inputs, count, op);
    case kFloat64:
      return reduce_plain<double>(output, inputs, count, op);
    case kBfloat16:
      return reduce_as<Bfloat, float>(output, inputs, count, op, &Bfloat::of);
  }
}

}  // namespace standin
