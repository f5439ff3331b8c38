#pragma once

#include "host/group.hpp"

namespace pycomm::host {

/// Reduce `count` elements at `data` over all ranks, in place, in rank order.
void all_reduce(Group& group, void* data, std::size_t count, DType dtype, ReduceOp op);

/// The same into the tensor of rank `root` only; the others' stay as they are.
void reduce(Group& group, void* data, std::size_t count, DType dtype, ReduceOp op, int root);

}  // namespace pycomm::host
