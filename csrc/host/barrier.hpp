#pragma once

#include "host/group.hpp"

namespace pycomm::host {

/// Return once every rank has called it.
void barrier(Group& group);

}  // namespace pycomm::host
