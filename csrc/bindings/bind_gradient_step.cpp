// The fused collectives of data-parallel training, over addresses: pycomm/fused.py answers for the memory behind them.
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "bindings/bindings.hpp"
#include "bindings/work.hpp"
#include "host/gradient_step.hpp"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using host::AdamWScalars;
using host::Communicator;
using host::GradientReduction;
using host::ParameterUpdate;
using host::Run;
using host::Runs;

struct RunsHandle {
  Runs runs;
};

RunsHandle make_runs(const std::vector<std::array<std::uint64_t, 6>>& rows) {
  std::vector<Run> runs;
  runs.reserve(rows.size());
  for (const auto& row : rows) runs.push_back({row[0], row[1], row[2], row[3], row[4], row[5]});
  return {std::make_shared<const std::vector<Run>>(std::move(runs))};
}

DType dtype_of(const std::string& name) {
  for (int value = 0; value < kNumNumberTypes; ++value) {
    const auto dtype = static_cast<DType>(value);
    if (name == name_of(dtype) && is_floating_point(dtype)) return dtype;
  }
  throw std::invalid_argument(name + " is not a floating-point dtype that gradients have");
}

template <class T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require_symmetric(const Communicator& self, const void* data, std::size_t bytes) {
  if (!self.is_symmetric(data, bytes)) throw std::invalid_argument("the buffer is not symmetric memory of this group");
}

GradientReduction make_reduction(std::uintptr_t grads, std::size_t count, const std::string& dtype,
                                 const RunsHandle& runs, bool to_all, std::uintptr_t shard,
                                 const std::string& shard_dtype, std::uintptr_t norms) {
  return {pointer(grads), count,          dtype_of(dtype),       runs.runs,
          to_all,         pointer(shard), dtype_of(shard_dtype), pointer<double>(norms)};
}

ParameterUpdate make_update(std::uintptr_t grads, const std::string& grad_dtype, bool grads_packed,
                            std::uintptr_t params, std::size_t count, const std::string& param_dtype,
                            std::uintptr_t master, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq,
                            const RunsHandle& runs) {
  return {pointer(grads),
          dtype_of(grad_dtype),
          grads_packed,
          pointer(params),
          count,
          dtype_of(param_dtype),
          pointer<float>(master),
          pointer<float>(exp_avg),
          pointer<float>(exp_avg_sq),
          runs.runs};
}

std::vector<AdamWScalars> scalars_of(const std::vector<std::array<double, 8>>& groups) {
  std::vector<AdamWScalars> scalars;
  for (const auto& group : groups) {
    std::array<float, 8> rounded;
    for (std::size_t i = 0; i < rounded.size(); ++i) rounded[i] = static_cast<float>(group[i]);
    scalars.push_back({rounded[0], rounded[1], rounded[2], rounded[3], rounded[4], rounded[5], rounded[6], rounded[7]});
  }
  return scalars;
}

MaybeWork reduce_gradients(Communicator& self, const GradientReduction& reduction, bool accumulate, bool async_op,
                           double timeout_s) {
  require_symmetric(self, reduction.grads, reduction.count * size_of(reduction.dtype));
  return self.collective([=](host::Group& group) { host::reduce_gradients(group, reduction, accumulate); },
                         {timeout_s, async_op});
}

void update_everywhere(Communicator& self, const ParameterUpdate& update,
                       const std::vector<std::array<double, 8>>& groups, bool reduce_first, double timeout_s) {
  require_symmetric(self, update.params, update.count * size_of(update.param_dtype));
  if (reduce_first) require_symmetric(self, update.grads, update.count * size_of(update.grad_dtype));
  self.collective([=, scalars = scalars_of(groups)](
                      host::Group& group) { host::update_everywhere(group, update, scalars, reduce_first); },
                  {timeout_s, false});
}

}  // namespace

void bind_gradient_step(py::module_& module) {
  module.attr("NORM_BLOCK") = host::kNormBlock;
  py::class_<RunsHandle>(module, "Runs").def(py::init(&make_runs), py::arg("rows"));
  py::class_<GradientReduction>(module, "GradientReduction")
      .def(py::init(&make_reduction), py::kw_only(), py::arg("grads"), py::arg("count"), py::arg("dtype"),
           py::arg("runs"), py::arg("to_all"), py::arg("shard"), py::arg("shard_dtype"), py::arg("norms"));
  py::class_<ParameterUpdate>(module, "ParameterUpdate")
      .def(py::init(&make_update), py::kw_only(), py::arg("grads"), py::arg("grad_dtype"), py::arg("grads_packed"),
           py::arg("params"), py::arg("count"), py::arg("param_dtype"), py::arg("master"), py::arg("exp_avg"),
           py::arg("exp_avg_sq"), py::arg("runs"));
  module.def("reduce_gradients", &reduce_gradients, NoGil());
  module.def("update_everywhere", &update_everywhere, NoGil());
  module.def(
      "update_locally",
      [](const ParameterUpdate& update, const std::vector<std::array<double, 8>>& groups) {
        host::update_locally(update, scalars_of(groups));
      },
      NoGil());
  module.def(
      "block_norms",
      [](std::uintptr_t values, const std::string& dtype, const RunsHandle& runs, std::uintptr_t norms) {
        host::block_norms(pointer(values), dtype_of(dtype), *runs.runs, pointer<double>(norms));
      },
      NoGil());
  module.def(
      "sum_in_order",
      [](std::uintptr_t values, std::size_t count) {
        double total = 0;
        for (std::size_t i = 0; i < count; ++i) total += pointer<const double>(values)[i];
        return total;
      },
      NoGil());
}

}  // namespace pycomm::bindings
