#include "bindings/arguments.hpp"

#include <string>
#include <string_view>
#include <vector>

#include "pycomm/call.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

Parts even_parts(const Tensor& whole, int world_size) {
  const auto n = static_cast<std::uint64_t>(world_size);
  if (whole.count() % n == 0) return Parts::even(whole.count() / n, world_size);
  const std::string name = whole.name();
  throw py::value_error(name + " has " + std::to_string(whole.count()) + " elements, which " + std::to_string(n) +
                        " ranks cannot share evenly: pass " + name + "_splits, or pad it");
}

void check_one_dtype(const Tensor& output, const Tensor& input) {
  if (output.dtype() == input.dtype()) return;
  throw py::value_error(std::string(output.name()) + " is torch." + name_of(output.dtype()) + ", " + input.name() +
                        " is torch." + name_of(input.dtype()) + ": both need one dtype");
}

bool overlap(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data()); };
  const auto end = [&](const Tensor& t) { return begin(t) + t.bytes(); };
  return a.count() != 0 && b.count() != 0 && begin(a) < end(b) && begin(b) < end(a);
}

[[noreturn]] void refuse_type(py::handle value, const std::string& name, const std::string& what) {
  throw py::type_error(name + " is " + py::repr(value).cast<std::string>() + ": it is " + what);
}

/// Nothing: it is an int, but has more than 64 bits.
std::optional<std::int64_t> integer_of(py::handle value, const std::string& name, const std::string& what) {
  if (PyIndex_Check(value.ptr()) == 0) refuse_type(value, name, what);
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) throw py::error_already_set();
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  return overflow == 0 ? std::optional<std::int64_t>(number) : std::nullopt;
}

std::string op_names() {
  std::string names;
  for (int op = 0; op < kNumReduceOps; ++op) names += (op == 0 ? "" : ", ") + std::string(name_of(ReduceOp(op)));
  return names;
}

}  // namespace

ReduceOp reduce_op_of(py::handle name, DType dtype) {
  if (PyUnicode_Check(name.ptr()) == 0) refuse_type(name, "op", "one of the names " + op_names());
  const auto text = name.cast<std::string_view>();
  for (int op = 0; op < kNumReduceOps; ++op) {
    const auto candidate = static_cast<ReduceOp>(op);
    if (text != name_of(candidate)) continue;
    static_cast<void>(arithmetic_of(dtype, candidate));
    return candidate;
  }
  throw py::value_error("op " + std::string(text) + " is not supported; it is one of " + op_names());
}

Parts parts_of(const Tensor& whole, py::handle splits, int world_size) {
  if (splits.is_none()) return even_parts(whole, world_size);
  const std::string name = whole.name();
  std::vector<std::uint64_t> counts;
  std::int64_t total = 0;
  if (!py::isinstance<py::iterable>(splits)) {
    refuse_type(splits, name + "_splits", "a sequence of counts, one a rank, or None");
  }
  for (const py::handle split : splits) {
    const std::string what = name + "_splits[" + std::to_string(counts.size()) + "]";
    const std::optional<std::int64_t> count = integer_of(split, what, "a count of rows, an int");
    if (count && *count < 0) {
      throw py::value_error(name + "_splits=" + py::repr(splits).cast<std::string>() + ": a count is negative");
    }
    if (!count || __builtin_add_overflow(total, *count, &total)) {
      throw py::value_error(name + "_splits=" + py::repr(splits).cast<std::string>() + " add up to more than 64 bits");
    }
    counts.push_back(static_cast<std::uint64_t>(*count));
  }
  if (counts.size() != static_cast<std::size_t>(world_size)) {
    throw py::value_error(name + "_splits has " + std::to_string(counts.size()) +
                          " counts, it needs one for each of the " + std::to_string(world_size) + " ranks");
  }
  if (whole.num_dims() == 0) throw py::value_error(name + " has no dim 0 to split: pass " + name + ".view(1)");
  const std::uint64_t rows = whole.rows();
  if (static_cast<std::uint64_t>(total) != rows) {
    throw py::value_error(name + "_splits=" + py::repr(splits).cast<std::string>() + " add up to " +
                          std::to_string(total) + ", dim 0 of " + name + " has " + std::to_string(rows));
  }
  const std::uint64_t row = rows == 0 ? 0 : whole.count() / rows;
  for (std::uint64_t& count : counts) count *= row;
  return Parts(std::move(counts));
}

int rank_of(py::handle value, int world_size, const char* name) {
  const std::string last = std::to_string(world_size - 1);
  const std::optional<std::int64_t> rank = integer_of(value, name, "a rank, an int from 0 to " + last);
  if (rank && *rank >= 0 && *rank < world_size) return static_cast<int>(*rank);
  throw py::value_error(std::string(name) + " is " + py::str(value).cast<std::string>() + ", it must be 0 to " + last);
}

std::int64_t tag_of(py::handle value) {
  if (const std::optional<std::int64_t> tag = integer_of(value, "tag", "an int")) return *tag;
  refuse_tag(value);
}

void refuse_tag(py::handle value) {
  throw py::value_error("tag=" + py::str(value).cast<std::string>() +
                        ": it is an integer of 64 bits, and -2**63 is taken");
}

bool flag_of(py::handle value, const char* name) {
  if (value.ptr() == Py_True) return true;
  if (value.ptr() == Py_False) return false;
  const PyNumberMethods* const number = Py_TYPE(value.ptr())->tp_as_number;
  if (number == nullptr || number->nb_bool == nullptr) refuse_type(value, name, "True or False");
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

double timeout_of(py::handle value, bool or_zero) {
  const PyNumberMethods* const number = Py_TYPE(value.ptr())->tp_as_number;
  const bool is_number = number != nullptr && (number->nb_float != nullptr || number->nb_index != nullptr);
  if (PyBool_Check(value.ptr()) || !is_number) refuse_type(value, "timeout_s", "a number of seconds");
  const double seconds = PyFloat_AsDouble(value.ptr());
  const bool too_large = PyErr_Occurred() != nullptr;
  PyErr_Clear();
  if (!too_large && seconds <= kLongestTimeout && (seconds > 0 || (or_zero && seconds == 0))) return seconds;
  throw py::value_error("timeout_s=" + py::str(value).cast<std::string>() +
                        ": it is a positive number of seconds, at most 1e9, since every wait is bounded");
}

void check_only_at_root(py::handle tensor, int root, int rank, const char* name) {
  if (tensor.is_none() != (rank == root)) return;
  const std::string text = name;
  const std::string the_root = std::to_string(root) + ", the root";
  throw py::value_error(rank == root
                            ? text + " is None on rank " + the_root + ", which needs it"
                            : text + " belongs to rank " + the_root + ": pass None on rank " + std::to_string(rank));
}

void check_count(const Tensor& tensor, std::uint64_t expected) {
  if (tensor.count() == expected) return;
  throw py::value_error(std::string(tensor.name()) + " has " + std::to_string(tensor.count()) + " elements (shape " +
                        tensor.shape_text() + "), it needs " + std::to_string(expected));
}

void check_apart(const Tensor& output, const Tensor& input) {
  check_one_dtype(output, input);
  if (overlap(output, input)) throw py::value_error("output and input overlap: pass separate memory");
}

void check_part(const Tensor& whole, const Tensor& part, const Parts& parts, int owner) {
  check_count(part, parts.count(owner));
  check_one_dtype(part, whole);
  if (!overlap(whole, part)) return;
  const std::uint64_t start = parts.start(owner);
  if (part.data() == static_cast<std::byte*>(whole.data()) + start * size_of(whole.dtype())) return;
  throw py::value_error(
      "output and input overlap: they may only where the smaller is this rank's own part of the larger, which starts "
      "at element " +
      std::to_string(start));
}

}  // namespace pycomm::bindings
