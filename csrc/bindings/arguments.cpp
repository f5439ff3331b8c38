#include "bindings/arguments.hpp"

#include <string>
#include <vector>

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

host::Parts even_parts(const Tensor& whole, int world_size) {
  const auto n = static_cast<std::uint64_t>(world_size);
  if (whole.count() % n == 0) return host::Parts::even(whole.count() / n, world_size);
  const std::string name = whole.name();
  throw py::value_error(name + " has " + std::to_string(whole.count()) + " elements, which " + std::to_string(n) +
                        " ranks cannot share evenly: pass " + name + "_splits, or pad it");
}

void check_one_dtype(const Tensor& output, const Tensor& input) {
  if (output.same_dtype(input)) return;
  const auto dtype = [](const Tensor& tensor) { return py::str(tensor.attribute("dtype")).cast<std::string>(); };
  throw py::value_error(std::string(output.name()) + " is " + dtype(output) + ", " + input.name() + " is " +
                        dtype(input) + ": both need one dtype");
}

bool overlap(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data()); };
  const auto end = [&](const Tensor& t) { return begin(t) + t.count() * t.element_bytes(); };
  return a.count() != 0 && b.count() != 0 && begin(a) < end(b) && begin(b) < end(a);
}

}  // namespace

ReduceOp reduce_op_of(std::string_view name) {
  std::string names;
  for (int op = 0; op < kNumReduceOps; ++op) {
    const char* const candidate = name_of(static_cast<ReduceOp>(op));
    if (name == candidate) return static_cast<ReduceOp>(op);
    names += (op == 0 ? "" : ", ") + std::string(candidate);
  }
  throw py::value_error("op " + std::string(name) + " is not supported; it is one of " + names);
}

host::Parts parts_of(const Tensor& whole, py::handle splits, int world_size) {
  if (splits.is_none()) return even_parts(whole, world_size);
  const std::string name = whole.name();
  std::vector<std::uint64_t> counts;
  std::int64_t total = 0;
  for (const py::handle split : splits) {
    const auto count = py::int_(py::reinterpret_borrow<py::object>(split)).cast<std::int64_t>();
    if (count < 0) {
      throw py::value_error(name + "_splits=" + py::repr(splits).cast<std::string>() + ": a count is negative");
    }
    counts.push_back(static_cast<std::uint64_t>(count));
    total += count;
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
  return host::Parts(std::move(counts));
}

void check_rank(int rank, int world_size, const char* name) {
  if (rank >= 0 && rank < world_size) return;
  throw py::value_error(std::string(name) + " is " + std::to_string(rank) + ", it must be 0 to " +
                        std::to_string(world_size - 1));
}

void check_only_at_root(py::handle tensor, int root, int rank, int world_size, const char* name) {
  check_rank(root, world_size, "root");
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

void check_part(const Tensor& whole, const Tensor& part, const host::Parts& parts, int owner) {
  check_count(part, parts.count(owner));
  check_one_dtype(part, whole);
  if (!overlap(whole, part)) return;
  const std::uint64_t start = parts.start(owner);
  if (part.data() == static_cast<std::byte*>(whole.data()) + start * whole.element_bytes()) return;
  throw py::value_error(
      "output and input overlap: they may only where the smaller is this rank's own part of the larger, which starts "
      "at element " +
      std::to_string(start));
}

}  // namespace pycomm::bindings
