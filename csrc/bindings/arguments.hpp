// What callers hand to a collective, checked before anything is sent: parts of tensors, and their overlap. All throw
// py::value_error, or py::type_error for what is of the wrong type.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "bindings/tensor.hpp"
#include "pycomm/parts.hpp"

namespace pycomm::bindings {

/// An operator by its name, for a tensor that has it. Throws for an unknown one, and where it has no meaning.
ReduceOp reduce_op_of(pybind11::handle name, DType dtype);

/// Each rank's part of `whole`, from counts along dim 0 (`splits`, a sequence), or equal ones (None).
Parts parts_of(const Tensor& whole, pybind11::handle splits, int world_size);

/// `name`: of the argument, "root", "dst" or "src".
int rank_of(pybind11::handle value, int world_size, const char* name);
std::int64_t tag_of(pybind11::handle value);
[[noreturn]] void refuse_tag(pybind11::handle value);
bool flag_of(pybind11::handle value, const char* name);
/// Positive and at most kLongestTimeout; `or_zero`: 0, too.
double timeout_of(pybind11::handle seconds, bool or_zero = false);
inline constexpr double kLongestTimeout = 1e9;  // 31 years: what every clock and timer can hold

/// The root has `tensor`, the others None.
void check_only_at_root(pybind11::handle tensor, int root, int rank, const char* name);

void check_count(const Tensor& tensor, std::uint64_t expected);

/// Both have one dtype and do not overlap.
void check_apart(const Tensor& output, const Tensor& input);

/// `part`, one of the two, is as long as part `owner` of the other, has its dtype, and lies there or elsewhere.
void check_part(const Tensor& whole, const Tensor& part, const Parts& parts, int owner);

}  // namespace pycomm::bindings
