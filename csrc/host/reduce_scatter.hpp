#pragma once

#include "host/group.hpp"
#include "host/parts.hpp"

namespace pycomm::host {

/// Reduce the input over all ranks, in rank order, and leave part `rank` in the output, which may be that part of the
/// input itself. `parts` is the same on all ranks.
void reduce_scatter(Group& group, const Tensors& tensors, const Parts& parts, ReduceOp op);

}  // namespace pycomm::host
