#pragma once

#include "host/group.hpp"

namespace pycomm::host {

/// Copy `bytes` bytes at `data` of rank `root` to `data` of every rank. The whole call (dtype, count, root) is matched.
void broadcast(Group& group, void* data, std::size_t count, DType dtype, int root);

}  // namespace pycomm::host
