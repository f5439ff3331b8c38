#pragma once

#include "host/group.hpp"
#include "host/parts.hpp"

namespace pycomm::host {

/// Copy part r of the input of rank `root` to the output of rank r. Only the root has an input; its output may be its
/// own part of it. `parts` are equal.
void scatter(Group& group, const Tensors& tensors, const Parts& parts, int root);

}  // namespace pycomm::host
