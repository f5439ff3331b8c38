#pragma once

#include "host/group.hpp"
#include "host/parts.hpp"

namespace pycomm::host {

/// Leave every rank's input in its part of everyone's output. An input may be its own part of the output. `parts` (of
/// the output) is the same on all ranks.
void all_gather(Group& group, const Tensors& tensors, const Parts& parts);

/// The same into the output of rank `root` only; the other ranks have none. `parts` are equal.
void gather(Group& group, const Tensors& tensors, const Parts& parts, int root);

}  // namespace pycomm::host
