// Work as Python sees it: one class, whoever runs the operation.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>

#include "pycomm/work.hpp"

namespace pycomm::bindings {

using MaybeWork = std::shared_ptr<Work>;  // none if the call was synchronous

/// An object that may be dropped where Python's lock is not held; it is given back later then.
std::shared_ptr<void> kept(pybind11::object object);

/// Without the GIL.
void wait_for(Work& work, std::optional<double> timeout_s);

}  // namespace pycomm::bindings
