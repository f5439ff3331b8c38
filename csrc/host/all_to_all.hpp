#pragma once

#include "host/group.hpp"
#include "host/parts.hpp"

namespace pycomm::host {

/// Copy part d of rank s's input to part s of rank d's output, for all pairs. Equal parts, the same on all ranks.
void all_to_all(Group& group, const Tensors& tensors, const Parts& parts);

/// The same with parts that each rank chooses. Throws kMismatch, on every rank, unless part d of s's input is as long
/// as part s of d's output.
void all_to_all_by_splits(Group& group, const Tensors& tensors, const Parts& output, const Parts& input);

}  // namespace pycomm::host
