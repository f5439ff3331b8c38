// Matrix products with their communication, as plans: what one rank does in one call, as data. Pure: no CUDA. The
// driver (overlapped_matmul.cpp) enqueues a plan; tests check that plans are free of races and deadlocks.
//
//   all_gather_matmul       x: own rows        out = cat(x over ranks) @ weight.T
//   matmul_reduce_scatter   x: all rows        out = own rows of the sum over ranks of x @ weight.T
//   matmul_all_reduce       x: all rows        out = the sum over ranks of x @ weight.T
//
// Rank r multiplies its own shard first and then those of r+1, r+2, … as they arrive; of a product that will be summed,
// it computes r+1's rows first and its own last, so that what travels farthest behind its product is ready first.
//
// A step runs on a lane (a stream), after the steps before it on its lane and after those named in `after`, whatever
// the order in which they were enqueued. Between ranks only flags order steps: kSignal sets a flag of a peer, kAwait
// waits for one of its own. Steps in the plan's order are also a valid order for a rank that does one at a time.
//
// Shared buffers have two sets that take turns, so nobody says that a set may be written again: a rank is in call e
// only after it has waited, in call e-1, for a flag of every peer, and a peer sets those of e-1 when its call e-2 is
// over, the last that read or wrote the set of e.
//
// Source: for the order of chunks TransformerEngine's comm_gemm_overlap.cpp and torch's _symmetric_memory; Wang et al.,
// "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models" (2023).
#pragma once

#include <cstdint>
#include <vector>

namespace pycomm::cuda {

enum class MatmulOp { kAllGatherMatmul = 0, kMatmulReduceScatter = 1, kMatmulAllReduce = 2 };

inline constexpr int kMaxPieces = 64;

/// Where rows lie.
enum class Buffer {
  kInput,     // x
  kOutput,    // out
  kShard,     // symmetric: own rows of x, for peers to read
  kGathered,  // all ranks' rows of x
  kPartial,   // this rank's product, all rows
  kArrived,   // symmetric: a part for each rank, with its product for this rank's rows
  kReduced,   // symmetric: this rank's rows of the sum, for peers to read
};

enum class StepKind {
  kCopy,      // from -> to
  kMultiply,  // from (rows of x) @ weight.T -> to
  kReduce,    // all parts of kArrived, in rank order -> to
  kSignal,    // sets `flag` of rank `peer`
  kAwait,     // waits for `flag` from rank `peer`
  kExchange,  // in one: send `from` to rank `peer`, receive `to` from rank `source`; either side may have no rows
};

/// Own flags are indexed by who sets them. Each grows from call to call: flag_value().
enum class Flag {
  kReady,    // rows of its kShard or kReduced can be read
  kArrived,  // its product for this rank's rows is in kArrived
};
inline constexpr int kNumFlags = 2;

/// Rows [begin, end) of a buffer of rank `rank`; `part`: of kArrived, whose.
struct Place {
  int rank;
  Buffer buffer;
  int part;
  std::int64_t begin, end;
};

struct Step {
  StepKind kind;
  int lane;
  Place from{};
  Place to{};
  int peer = 0;
  int source = 0;
  Flag flag{};
  int piece = 0;  // kSignal, kAwait: its number
  std::vector<int> after;
  bool has_waiter = false;  // a step of another lane names it in `after`
};

/// What the flag of a call (1, 2, …) and piece is set to.
constexpr std::int64_t flag_value(std::int64_t call, int piece) { return call * kMaxPieces + piece; }

struct PlanOptions {
  int num_pieces = 1;  // that other ranks' rows are cut into
  int num_lanes = 8;   // for products whose input arrives: with one a chunk, none waits for another's input
  bool mapped = true;  // peers' memory is mapped: copies and flags; else exchanges (NCCL's send and recv)
};

struct Plan {
  std::vector<Step> steps;
  int num_lanes = 0;           // lanes of all kinds
  int num_multiply_lanes = 0;  // the first ones: kMultiply is on no other
};

/// `rows`: of each rank's shard; ranks may have none. Throws std::invalid_argument.
Plan make_plan(MatmulOp op, int rank, const std::vector<std::int64_t>& rows, const PlanOptions& options);

}  // namespace pycomm::cuda
