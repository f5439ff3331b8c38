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
  kAgree = 6,  // a row of every rank to every rank: count its numbers, splits its bytes
  kReduceScatter = 7,
  kAllGather = 8,
  kAllToAll = 9,
  kReduce = 10,
  kGather = 11,
  kScatter = 12,
  kSend = 13,  // messages are no calls of all ranks: root is the peer, splits the tag
  kRecv = 14,
  kReduceGradients = 15,
  kUpdateParameters = 16,
  kAwait = 17,  // no matched call: a wait for what peers have posted, `count` the epoch
  kScan = 18,
};

/// What Python calls a kind, and how messages describe its calls: %o operator, %e elements with their dtype, %r root,
/// %s uneven splits, %p peer, %t tag, %n count; %k, %d, %u, %v as in call.cpp.
struct OpText {
  const char* name;
  const char* arguments;
};
inline constexpr OpText kOpTexts[] = {
    {"none", ""},
    {"barrier", ""},
    {"all_reduce", "%o, %e%k"},
    {"broadcast", "%r, %e"},
    {"empty", "%n bytes"},
    {"split", ""},
    {"agree", "row[%n]"},
    {"reduce_scatter", "%o, %e%s"},
    {"all_gather", "%e%s"},
    {"all_to_all", "%v"},
    {"reduce", "%r, %o, %e"},
    {"gather", "%r, %e in all"},
    {"scatter", "%r, %e in all"},
    {"send", "dst=%p, tag=%t, %e"},
    {"recv", "src=%p, tag=%t, %e"},
    {"reduce_gradients", "%d, %e"},
    {"update_parameters", "%u%e"},
    {"wait_posted", "%n"},
    {"scan", "%o, %e"},
};
inline constexpr int kNumOpKinds = sizeof(kOpTexts) / sizeof(kOpTexts[0]);
static_assert(kNumOpKinds == static_cast<int>(OpKind::kScan) + 1);

constexpr const char* name_of(OpKind kind) { return kOpTexts[static_cast<int>(kind)].name; }

/// Who does a collective on GPUs, where ranks choose by what each knows and compare afterwards: the back end's library,
/// or one of pycomm's kernels, by the name that Python has for it.
enum class Route : std::uint8_t { kBackend = 0, kOneShot = 1, kTwoShot = 2 };
inline constexpr const char* kRouteNames[] = {"nccl", "one_shot", "two_shot"};
inline constexpr int kNumRoutes = sizeof(kRouteNames) / sizeof(kRouteNames[0]);

constexpr const char* name_of(Route route) { return kRouteNames[static_cast<int>(route)]; }

struct Call {
  OpKind kind = OpKind::kNone;
  DType dtype = DType::kUInt8;
  ReduceOp reduce_op = ReduceOp::kSum;
  Route route = Route::kBackend;
  std::int32_t root = 0;
  std::uint64_t count = 0;   // elements
  std::uint64_t splits = 0;  // a hash of the ranks' parts where they differ, else 0; all_to_all: 1 if by splits;
                             // by a kernel in symmetric memory: the tensor's Location

  bool operator==(const Call&) const = default;
  std::uint64_t bytes() const { return count * size_of(dtype); }
};
static_assert(sizeof(Call) == 24);

/// Where a rank's data lies: a symmetric segment that every rank maps, or nowhere that a peer could see.
class Location {
 public:
  static constexpr int kOffsetBits = 40;
  static constexpr std::uint64_t kMaxSegments = std::uint64_t{1} << (64 - kOffsetBits);
  static constexpr std::uint64_t kMaxOffset = (std::uint64_t{1} << kOffsetBits) - 1;

  Location() = default;  // ordinary memory
  /// `offset` bytes into this rank's part of segment `segment`, 1 to kMaxSegments - 1.
  Location(std::uint64_t segment, std::uint64_t offset) : bits_(segment << kOffsetBits | offset) {}

  static Location of_bits(std::uint64_t bits) { return {bits >> kOffsetBits, bits & kMaxOffset}; }
  std::uint64_t bits() const { return bits_; }

  bool symmetric() const { return bits_ != 0; }
  std::uint64_t segment() const { return bits_ >> kOffsetBits; }
  std::uint64_t offset() const { return bits_ & kMaxOffset; }

 private:
  std::uint64_t bits_ = 0;
};

/// The memory of one rank in a call. In-place calls show one tensor, as both.
struct Locations {
  Location input;
  Location output;
};

/// "all_reduce(sum, float32[1024])", "broadcast(root=1, int64[3])", "barrier()".
std::string describe(const Call& call);

/// Whether its enumerators have names: of a call that came from another process.
bool is_known(const Call& call);

/// How elements are reduced: as numbers that have arithmetic, one or more of them an element.
struct Arithmetic {
  DType dtype;
  ReduceOp op;
  std::size_t per_element = 1;
};

/// bool by "or" (sum, max) and "and" (prod, min), complex numbers as pairs, all others as they are. Throws
/// std::invalid_argument if `op` over `dtype` has no meaning: the one check of that, for every transport.
Arithmetic arithmetic_of(DType dtype, ReduceOp op);

}  // namespace pycomm
