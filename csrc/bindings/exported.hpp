// Memory of ours as a tensor of other libraries, by DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/dlpack.hpp"

namespace pycomm::bindings {

/// A capsule for torch.from_dlpack: `bytes` uint8 at `data`. What is made of it keeps `owner`.
pybind11::capsule exported(void* data, std::int64_t bytes, dlpack::Device device, pybind11::object owner);

}  // namespace pycomm::bindings
