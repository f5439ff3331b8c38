// What callers hand to a collective, checked before anything is sent: parts of tensors, and their overlap. All throw
// py::value_error.
#pragma once

#include <pybind11/pybind11.h>

#include <string_view>

#include "bindings/tensor.hpp"
#include "host/parts.hpp"

namespace pycomm::bindings {

/// Throws for an unknown name.
ReduceOp reduce_op_of(std::string_view name);

/// Each rank's part of `whole`, from counts along dim 0 (`splits`, a sequence), or equal ones (None).
host::Parts parts_of(const Tensor& whole, pybind11::handle splits, int world_size);

/// `name`: of the argument, "root", "dst" or "src".
void check_rank(int rank, int world_size, const char* name);

/// The root has `tensor`, the others None.
void check_only_at_root(pybind11::handle tensor, int root, int rank, int world_size, const char* name);

void check_count(const Tensor& tensor, std::uint64_t expected);

/// Both have one dtype and do not overlap.
void check_apart(const Tensor& output, const Tensor& input);

/// `part`, one of the two, is as long as part `owner` of the other, has its dtype, and lies there or elsewhere.
void check_part(const Tensor& whole, const Tensor& part, const host::Parts& parts, int owner);

}  // namespace pycomm::bindings
