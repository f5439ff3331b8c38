// The collectives of the host transport. Each is a function in the file of its name, which opens with its steps, the
// bytes that each rank touches, and why each read sees its write. All of `call` is matched, and was checked; a tensor
// that is reduced in place, or sent from and to one place, is both operands.
#pragma once

#include "host/group.hpp"
#include "pycomm/backend.hpp"

namespace pycomm::host {

/// Also reduce, which is the same with one rank to write to.
void all_reduce(Group& group, const Call& call, const Operands& operands);
void broadcast(Group& group, const Call& call, const Operands& operands);
void reduce_scatter(Group& group, const Call& call, const Operands& operands);
/// Also gather, which is the same with one reader.
void all_gather(Group& group, const Call& call, const Operands& operands);
void scatter(Group& group, const Call& call, const Operands& operands);
void scan(Group& group, const Call& call, const Operands& operands);
/// Equal parts, or parts that each rank chooses: throws kMismatch then, on every rank, unless part d of rank s's input
/// is as long as part s of rank d's output.
void all_to_all(Group& group, const Call& call, const Operands& operands);

/// The one of `call`'s kind.
inline void collective(Group& group, const Call& call, const Operands& operands) {
  switch (call.kind) {
    case OpKind::kBarrier: {
      const Entry entry(group, call);  // each rank writes its slot and reads the others': that is one
      return;
    }
    case OpKind::kAllReduce:
    case OpKind::kReduce:
      return all_reduce(group, call, operands);
    case OpKind::kBroadcast:
      return broadcast(group, call, operands);
    case OpKind::kReduceScatter:
      return reduce_scatter(group, call, operands);
    case OpKind::kAllGather:
    case OpKind::kGather:
      return all_gather(group, call, operands);
    case OpKind::kScatter:
      return scatter(group, call, operands);
    case OpKind::kScan:
      return scan(group, call, operands);
    case OpKind::kAllToAll:
      return all_to_all(group, call, operands);
    default:
      throw std::invalid_argument(describe(call) + " is no collective");
  }
}

}  // namespace pycomm::host
