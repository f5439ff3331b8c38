// Overlapped products, and their plans as data.
#include <pybind11/stl.h>

#include <array>

#include "bindings/addresses.hpp"
#include "bindings/bindings.hpp"
#include "cuda/matmul/overlapped_matmul.hpp"

namespace py = pybind11;

namespace pycomm::bindings {
namespace {

using namespace pycomm::cuda;  // NOLINT: this file is about it
using Rows = std::vector<std::int64_t>;

constexpr const char* kOps[] = {"all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"};
constexpr const char* kBuffers[] = {"input", "output", "shard", "gathered", "partial", "arrived", "reduced"};
constexpr const char* kKinds[] = {"copy", "multiply", "reduce", "signal", "await", "exchange"};
constexpr const char* kFlags[] = {"ready", "arrived"};

MatmulOp parse_matmul(const std::string& name) {
  for (int op = 0; op < 3; ++op) {
    if (name == kOps[op]) return static_cast<MatmulOp>(op);
  }
  throw std::invalid_argument("unknown operation \"" + name +
                              "\": it is one of all_gather_matmul, matmul_reduce_scatter, matmul_all_reduce");
}

/// (rank, buffer, part, first row, last row + 1)
py::tuple place_of(const Place& place) {
  return py::make_tuple(place.rank, kBuffers[static_cast<int>(place.buffer)], place.part, place.begin, place.end);
}

py::dict describe(const Step& step) {
  py::dict fields;
  fields["kind"] = kKinds[static_cast<int>(step.kind)];
  fields["lane"] = step.lane;
  fields["after"] = step.after;
  if (step.kind == StepKind::kSignal || step.kind == StepKind::kAwait) {
    fields["flag"] = kFlags[static_cast<int>(step.flag)];
    fields["peer"] = step.peer;
    fields["piece"] = step.piece;
    return fields;
  }
  fields["from"] = place_of(step.from);
  fields["to"] = place_of(step.to);
  if (step.kind == StepKind::kExchange) {
    fields["peer"] = step.peer;
    fields["source"] = step.source;
  }
  return fields;
}

py::list plan(const std::string& op, int rank, const Rows& rows, int num_pieces, int num_lanes, bool mapped) {
  py::list steps;
  for (const Step& step : make_plan(parse_matmul(op), rank, rows, {num_pieces, num_lanes, mapped}).steps) {
    steps.append(describe(step));
  }
  return steps;
}

MatmulCapacity capacity_of(const std::array<std::int64_t, 4>& c) { return {c[0], c[1], c[2], c[3]}; }

std::unique_ptr<OverlappedMatmul> make(std::shared_ptr<SymmetricMemory> memory, int device,
                                       std::vector<int> local_ranks, const std::array<std::int64_t, 4>& capacity,
                                       const std::vector<std::string>& cublaslt, int num_pieces, int num_lanes,
                                       int num_multiprocessors, int reduce_blocks, std::size_t workspace_bytes) {
  const int world_size = memory->world_size();
  MatmulParts parts{std::move(memory), std::move(local_ranks), world_size, {}, nullptr};
  for (std::size_t i = 0; i < parts.local_ranks.size(); ++i) {
    parts.multipliers.push_back(cublaslt_multiplier(device, cublaslt, num_lanes, num_multiprocessors, workspace_bytes));
  }
  return make_overlapped_matmul(std::move(parts), capacity_of(capacity),
                                {device, {num_pieces, num_lanes, true}, reduce_blocks});
}

/// (x, weight, out) of a rank
using TensorAddresses = std::array<Address, 3>;

void enqueue(OverlappedMatmul& matmul, const std::string& op, const std::string& dtype, const Rows& rows,
             std::int64_t in_features, std::int64_t out_features, bool transposed, bool one_by_one,
             const std::vector<TensorAddresses>& addresses, Address caller) {
  std::vector<MatmulTensors> tensors;
  for (const auto& [x, weight, out] : addresses) {
    tensors.push_back({pointer<const void>(x), pointer<const void>(weight), pointer<void>(out)});
  }
  matmul.enqueue({parse_matmul(op), parse_dtype(dtype), rows, in_features, out_features, transposed, one_by_one},
                 tensors, reinterpret_cast<Stream>(caller));
}

/// One product on lane 0, for measurements beside overlapped ones.
void multiply(Multiplier& multiplier, const std::string& dtype, std::int64_t rows, std::int64_t in_features,
              std::int64_t out_features, const TensorAddresses& addresses, Address stream) {
  multiplier.multiply({parse_dtype(dtype), rows, in_features, out_features, false, pointer<const void>(addresses[0]),
                       pointer<const void>(addresses[1]), pointer<void>(addresses[2])},
                      0, reinterpret_cast<Stream>(stream));
}

}  // namespace

void bind_overlapped_matmul(py::module_& module) {
  module.def("matmul_plan", &plan, py::arg("op"), py::arg("rank"), py::arg("rows"), py::arg("num_pieces"),
             py::arg("num_lanes"), py::arg("mapped"));
  module.def(
      "matmul_workspace_bytes",
      [](const std::array<std::int64_t, 4>& capacity, int world_size) {
        return matmul_workspace_bytes(capacity_of(capacity), world_size);
      },
      py::arg("capacity"), py::arg("world_size"));
  py::class_<Multiplier>(module, "CublasLt")
      .def(py::init([](int device, const std::vector<std::string>& names, std::size_t workspace_bytes) {
             return cublaslt_multiplier(device, names, 1, 0, workspace_bytes);
           }),
           py::arg("device"), py::arg("names"), py::arg("workspace_bytes"))
      .def("multiply", &multiply, py::arg("dtype"), py::arg("rows"), py::arg("in_features"), py::arg("out_features"),
           py::arg("tensors"), py::arg("stream"));
  py::class_<OverlappedMatmul>(module, "OverlappedMatmul")
      .def(py::init(&make), py::arg("memory"), py::arg("device"), py::arg("local_ranks"), py::arg("capacity"),
           py::arg("cublaslt"), py::arg("num_pieces"), py::arg("num_lanes"), py::arg("num_multiprocessors"),
           py::arg("reduce_blocks"), py::arg("workspace_bytes"))
      .def("enqueue", &enqueue, py::arg("op"), py::arg("dtype"), py::arg("rows"), py::arg("in_features"),
           py::arg("out_features"), py::arg("transposed"), py::arg("one_by_one"), py::arg("tensors"), py::arg("caller"),
           NoGil())
      .def("gathered", [](const OverlappedMatmul& self) { return reinterpret_cast<Address>(self.gathered()); })
      .def("wait", &OverlappedMatmul::wait, py::arg("timeout_s"), NoGil());
}

}  // namespace pycomm::bindings
