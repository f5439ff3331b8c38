// What a rank says of a collective before it starts: the part that every rank must agree on (op … count) and where
// its own data lies. Lives in shared memory: fixed size, no pointers.
#pragma once

#include <cstdint>
#include <string>

#include "pycomm/types.hpp"

namespace pycomm {

enum class OpKind : std::uint8_t {
  kNone = 0,
  kBarrier = 1,
  kAllReduce = 2,
  kBroadcast = 3,
  kAllocate = 4,  // symmetric memory, first of its three exchanges
  kSplit = 5,
  kExchange = 6,  // internal: a few bytes from every rank to every rank
};

struct Call {
  OpKind kind = OpKind::kNone;
  DType dtype = DType::kUInt8;
  ReduceOp reduce_op = ReduceOp::kSum;
  std::uint8_t reserved = 0;
  std::int32_t root = 0;
  std::uint64_t count = 0;  // elements

  bool operator==(const Call&) const = default;
  std::uint64_t bytes() const { return count * size_of(dtype); }
};
static_assert(sizeof(Call) == 16);

/// Where a rank's data lies: a symmetric segment that every rank maps, or nowhere that a peer could see.
struct Location {
  static constexpr std::uint64_t kOrdinary = 0;  // segment ids start at 1
  std::uint64_t segment = kOrdinary;
  std::uint64_t offset = 0;  // bytes into this rank's part

  bool symmetric() const { return segment != kOrdinary; }
};

/// "all_reduce(sum, float32[1024])", "broadcast(root=1, int64[3])", "barrier()".
std::string describe(const Call& call);

}  // namespace pycomm
